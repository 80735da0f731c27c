"""Render the part of Go's text/template that this project's Ollama templates use.

A template and the values that Ollama passes go in, a prompt comes out. Strict: whatever lies
outside that part (trim markers, comments, other functions, printing what is no string) is an error,
never a guess. The language is that of https://pkg.go.dev/text/template.
"""

import re
from dataclasses import dataclass
from typing import Any

ESCAPE = re.compile(r'\\(?:(["\\nrt])|u([0-9a-f]{4})|U([0-9a-f]{8}))')
TOKEN = re.compile(
    r'\s*(?:(?P<close>\}\})|(?P<string>"(?:[^"\\\n]|\\.)*")|(?P<number>\d+)\b|(?P<mark>:=|[(),=])'
    r"|(?P<variable>\$\w*(?:\.\w+)*)|(?P<field>(?:\.\w+)+)|(?P<name>[a-z]+)\b)"
)
SHORT = {"n": "\n", "r": "\r", "t": "\t"}
Token = tuple[str, str]


def quote(text: str) -> str:
    """Return text as a Go string constant, in printable characters and without a newline."""
    return '"' + "".join(map(quote_character, text)) + '"'


def quote_character(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    if character.isprintable():
        return character
    return f"\\u{ord(character):04x}" if ord(character) < 0x10000 else f"\\U{ord(character):08x}"


def unquote(constant: str) -> str:
    body = constant[1:-1]
    if "\\" in ESCAPE.sub("", body):
        raise ValueError(f"escape outside the subset in {constant}")
    return ESCAPE.sub(
        lambda found: (
            SHORT.get(found[1], found[1]) if found[1] else chr(int(found[2] or found[3], 16))
        ),
        body,
    )


@dataclass(frozen=True)
class Branch:
    """An `if` or a `range`: its action, what it holds, and what stands after `else`."""

    action: list[Token]
    body: list[Any]
    otherwise: list[Any]


def split(template: str) -> list[str | list[Token]]:
    """Return texts, and actions as lists of tokens."""
    parts: list[str | list[Token]] = []
    position = 0
    while (start := template.find("{{", position)) >= 0:
        if start > position:
            parts.append(template[position:start])
        action: list[Token] = []
        position = start + 2
        while (found := TOKEN.match(template, position)) and found.lastgroup != "close":
            action.append((found.lastgroup, found[found.lastgroup]))
            position = found.end()
        if not found or not action:
            raise ValueError(f"outside the subset: {template[start : position + 20]!r}")
        parts.append(action)
        position = found.end()
    return [*parts, template[position:]] if position < len(template) else parts


def parse(template: str) -> list[Any]:
    """Return a template as a tree of texts, actions and branches.

    Raises:
        ValueError: it is no template, or uses what is outside the subset.
    """
    parts = split(template)
    tree, left = parse_list(parts, 0)
    if left != len(parts):
        raise ValueError("end or else without an if or a range")
    return tree


def parse_list(parts: list[Any], index: int) -> tuple[list[Any], int]:
    nodes: list[Any] = []
    while index < len(parts):
        part = parts[index]
        word = part[0] if isinstance(part, list) else None
        if word in (("name", "end"), ("name", "else")):
            return nodes, index
        if word in (("name", "if"), ("name", "range")):
            part, index = parse_branch(part, parts, index)
        nodes.append(part)
        index += 1
    return nodes, index


def parse_branch(action: list[Token], parts: list[Any], index: int) -> tuple[Branch, int]:
    """Return a branch and the index of its `end`; an `else if` shares that of its chain."""
    body, index = parse_list(parts, index + 1)
    if index == len(parts):
        raise ValueError("an if or a range without its end")
    word = parts[index]
    if word == [("name", "end")]:
        return Branch(action, body, []), index
    if word[:2] == [("name", "else"), ("name", "if")]:
        inner, index = parse_branch(word[1:], parts, index)
        return Branch(action, body, [inner]), index
    otherwise, index = parse_list(parts, index + 1)
    if word != [("name", "else")] or index == len(parts) or parts[index] != [("name", "end")]:
        raise ValueError("an else that is followed by anything but its end")
    return Branch(action, body, otherwise), index


def render(template: str, values: dict[str, Any]) -> str:
    """Return what Go writes for a template and its values.

    Raises:
        ValueError: Go would fail, or the template uses what is outside the subset.
    """
    return run(parse(template), values, [{"$": values}])


def run(nodes: list[Any], dot: Any, scopes: list[dict[str, Any]]) -> str:
    """Write each node; variables live from where they are declared to the end of their list."""
    scopes, written = [*scopes, {}], []
    for node in nodes:
        if isinstance(node, str):
            written.append(node)
        elif isinstance(node, Branch):
            written.append(run_branch(node, dot, scopes))
        elif len(node) > 2 and node[0][0] == "variable" and node[1][1] in (":=", "="):
            assign(node[0][1], node[1][1], evaluate(node[2:], dot, scopes), scopes)
        else:
            written.append(expect(str, evaluate(node, dot, scopes)))
    return "".join(written)


def run_branch(branch: Branch, dot: Any, scopes: list[dict[str, Any]]) -> str:
    word, rest = branch.action[0][1], branch.action[1:]
    if word == "if":
        chosen = branch.body if evaluate(rest, dot, scopes) else branch.otherwise
        return run(chosen, dot, scopes)
    kinds = [kind for kind, _ in rest[:4]]
    if kinds != ["variable", "mark", "variable", "mark"] or rest[1][1] + rest[3][1] != ",:=":
        raise ValueError("a range outside the subset: give it an index and an element")
    items = expect(list, evaluate(rest[4:], dot, scopes))
    if branch.otherwise:
        raise ValueError("a range with an else is outside the subset")
    index, element = rest[0][1], rest[2][1]
    return "".join(
        run(branch.body, item, [*scopes, {index: number, element: item}])
        for number, item in enumerate(items)
    )


def assign(name: str, mark: str, value: Any, scopes: list[dict[str, Any]]) -> None:
    if mark == ":=":
        scopes[-1][name] = value
        return
    holders = [scope for scope in scopes if name in scope]
    if not holders:
        raise ValueError(f"{name} is not declared")
    holders[-1][name] = value


def expect(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{value!r} where the subset has a {kind.__name__}")
    return value


def evaluate(tokens: list[Token], dot: Any, scopes: list[dict[str, Any]]) -> Any:
    """Return the value of one operand, or of a function called with operands."""
    left = list(tokens)
    value = call(left, dot, scopes)
    if left:
        raise ValueError(f"outside the subset: {left[0][1]!r} after a value")
    return value


def call(left: list[Token], dot: Any, scopes: list[dict[str, Any]]) -> Any:
    if not left or left[0][0] != "name" or left[0][1] in ("true", "false"):
        return operand(left, dot, scopes)
    name, arguments = left.pop(0)[1], []
    while left and left[0][1] != ")":
        arguments.append(operand(left, dot, scopes))
    return apply(name, arguments)


def operand(left: list[Token], dot: Any, scopes: list[dict[str, Any]]) -> Any:
    if not left:
        raise ValueError("a value is missing")
    kind, text = left.pop(0)
    if text == "(" and kind == "mark":
        value = call(left, dot, scopes)
        if not left or left.pop(0)[1] != ")":
            raise ValueError("a bracket is not closed")
        return value
    if kind == "string":
        return unquote(text)
    if kind == "number":
        return int(text)
    if text in ("true", "false"):
        return text == "true"
    if kind in ("field", "variable"):
        return look_up(text, dot, scopes)
    raise ValueError(f"{text!r} is outside the subset")


def look_up(path: str, dot: Any, scopes: list[dict[str, Any]]) -> Any:
    head, *fields = path.split(".")
    value = dot
    if head:
        holders = [scope for scope in scopes if head in scope]
        if not holders:
            raise ValueError(f"{head} is not declared")
        value = holders[-1][head]
    for field in fields:
        if not isinstance(value, dict) or field not in value:
            raise ValueError(f"{path} names no value")
        value = value[field]
    return value


def apply(name: str, arguments: list[Any]) -> Any:
    kinds = [type(argument) for argument in arguments]
    if name in ("eq", "ne") and kinds in ([str, str], [int, int]):
        return (arguments[0] == arguments[1]) == (name == "eq")
    if name == "len" and kinds in ([list], [str]):
        return len(arguments[0]) if kinds == [list] else len(arguments[0].encode())
    if name == "slice" and kinds == [list, int] and arguments[1] <= len(arguments[0]):
        return arguments[0][arguments[1] :]
    if name == "and" and arguments:
        return next((value for value in arguments if not value), arguments[-1])
    raise ValueError(f"{name} with {len(arguments)} such arguments is outside the subset")
