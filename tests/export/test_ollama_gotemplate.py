from pathlib import Path

import pytest
from go_templates import run_go

from lora_grpo.export.ollama_gotemplate import quote, render

TALK = [
    {"Role": "user", "Content": '{{ one }} "two"\n'},
    {"Role": "assistant", "Content": "naïve 😀"},
    {"Role": "user", "Content": ""},
]
VALUES = {"System": "S <b>&", "Messages": TALK}
HARD = 'a "quote" \\ back\n\ttab {{ braces }} \u00a0\u200d\u2028 \x07 😀 \U000e0001 naïve """'
RANGE = "{{ range $i, $m := .Messages }}%s{{ end }}"
SNIPPETS = {
    "plain } }} text {": "plain } }} text {",
    "{{.System}}{{ $.System }}": "S <b>&S <b>&",
    "{{ if .System }}yes{{ else }}no{{ end }}": "yes",
    '{{ if eq .System "x" }}1{{ else if ne .System "x" }}2{{ else }}3{{ end }}': "2",
    "{{ if 0 }}a{{ else if false }}b{{ else if true }}c{{ end }}": "c",
    "{{ $a := \"x\" }}{{ if true }}{{ $a = \"y\" }}{{ end }}{{ $a }}": "y",
    "{{ $a := \"x\" }}{{ if true }}{{ $a := \"y\" }}{{ $a }}{{ end }}{{ $a }}": "yx",
    RANGE % "{{ .Role }},{{ $m.Role }};": "user,user;assistant,assistant;user,user;",
    RANGE % "{{ if eq (len (slice $.Messages $i)) 1 }}last{{ end }}.": "..last.",
    RANGE % "{{ if .Content }}{{ $.System }}{{ end }}": "S <b>&S <b>&",
    '{{ $f := true }}' + RANGE % "{{ if $f }}1{{ else }}2{{ end }}{{ $f = false }}": "122",
    '{{ if and .System (eq 1 1) (ne "a" "b") }}t{{ end }}': "t",
    "{{ if eq (len .System) 6 }}bytes{{ end }}": "bytes",
    "{{ " + quote(HARD) + " }}": HARD,
}  # fmt: skip


@pytest.mark.parametrize("template", SNIPPETS)
def test_the_renderer_writes_what_the_template_says(template: str) -> None:
    assert render(template, VALUES) == SNIPPETS[template]


def test_go_writes_the_same(tmp_path: Path) -> None:
    assert run_go(tmp_path, [(template, VALUES) for template in SNIPPETS]) == list(
        SNIPPETS.values()
    )


@pytest.mark.parametrize(
    "template",
    [
        "{{- .System }}",
        "{{ .System -}}",
        "{{/* note */}}",
        "{{ }}",
        "{{ .System",
        "{{ .Missing }}",
        "{{ $unknown }}",
        "{{ $unknown = 1 }}",
        "{{ .Messages }}",
        "{{ len .System }}",
        "{{ .System | len }}",
        "{{ printf .System }}",
        "{{ eq .System 1 }}",
        '{{ "\\x41" }}',
        "{{ .System .System }}",
        "{{ (.System }}",
        "{{ if .System }}",
        "{{ end }}",
        "{{ else }}",
        "{{ if .System }}{{ else }}{{ else }}{{ end }}",
        "{{ range .Messages }}{{ end }}",
        "{{ range $i, $m := .System }}{{ end }}",
        "{{ with .System }}{{ end }}",
        "{{ slice .Messages 4 }}",
        "{{ if true }}{{ $a := 1 }}{{ end }}{{ if $a }}{{ end }}",
    ],
)
def test_what_lies_outside_the_subset_is_an_error(template: str) -> None:
    with pytest.raises(ValueError):
        render(template, VALUES)
