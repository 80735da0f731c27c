"""Ollama's templates rendered by Go itself."""

import json
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
    """Render with Go itself; what Ollama does with a template, less what it does before."""
    if GO is None:
        pytest.skip("no `go` on the path: Debian's golang-go has it")
    program = folder / "render.go"
    program.write_text(PROGRAM)
    asked = json.dumps([{"Template": template, **values} for template, values in cases])
    done = subprocess.run([GO, "run", program], input=asked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
