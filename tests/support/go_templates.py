"""Ollama's templates rendered by other code than the project's: by Go itself where it is installed,
and by an interpreter of the few actions that they use."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

GO = shutil.which("go")


PROGRAM = """
package main

import ("encoding/json"; "os"; "strings"; "text/template")

type Message struct { Role, Content string }
type Case struct { Template, System string; Messages []*Message }

func main() {
	var cases []Case
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
	var found []string
	for _, c := range cases {
		var text strings.Builder
		t := template.Must(template.New("").Option("missingkey=zero").Parse(c.Template))
		values := map[string]any{"System": c.System, "Messages": c.Messages, "Response": ""}
		if err := t.Execute(&text, values); err != nil { panic(err) }
		found = append(found, text.String())
	}
	if err := json.NewEncoder(os.Stdout).Encode(found); err != nil { panic(err) }
}
"""


def run_go(folder: Path, cases: list[tuple[str, dict]]) -> list[str]:
    """Render with Go itself; what Ollama does with a template once it has the messages."""
    if GO is None:
        pytest.skip("no `go` on the path: Debian's golang-go has it")
    program = folder / "render.go"
    program.write_text(PROGRAM)
    asked = json.dumps([{"Template": template, **values} for template, values in cases])
    done = subprocess.run([GO, "run", program], input=asked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


ACTION = re.compile(r"{{ (.*?) }}")


def interpret(template: str, values: dict) -> str:
    """Render the actions that the templates use; any other one is an error."""
    words = ACTION.split(template)  # texts and actions in turn

    def run(start: int, dot: dict, last: bool, state: dict, live: bool) -> tuple[str, int]:
        """Render up to an `else` or `end` of this level; return the text and where that stands."""
        text, place = words[start] if live else "", start + 1
        while place < len(words):
            action = words[place]
            if action == "end" or action.startswith("else"):
                return text, place
            if action.startswith("if "):
                found, place = branches(place, dot, last, state, live)
            elif action == "range $i, $_ := .Messages":
                found = ""
                for index, message in enumerate(values["Messages"]):
                    is_last = index + 1 == len(values["Messages"])
                    found += run(place + 1, message, is_last, state, live)[0]
                place = run(place + 1, {}, False, {}, False)[1]
            elif action in ("$first := true", "$first = false"):
                if live:
                    state["first"] = action.endswith("true")
                found = ""
            else:
                found = {"$.System": values["System"], ".Content": dot.get("Content")}[action]
            text += (found if live else "") + (words[place + 1] if live else "")
            place += 2
        return text, place

    def branches(place: int, dot: dict, last: bool, state: dict, live: bool) -> tuple[str, int]:
        text, taken = "", False
        while (action := words[place]) != "end":
            condition = action.removeprefix("else").strip().removeprefix("if").strip()
            holds = {
                "": True,
                "$.System": bool(values["System"]),
                "$first": bool(state.get("first")),
                "eq (len (slice $.Messages $i)) 1": last,
                'eq .Role "user"': dot.get("Role") == "user",
                'eq .Role "assistant"': dot.get("Role") == "assistant",
            }[condition]
            chosen = live and holds and not taken
            found, place = run(place + 1, dot, last, state, chosen)
            text, taken = text + found, taken or holds
        return text, place

    return run(0, {}, False, {}, True)[0]
