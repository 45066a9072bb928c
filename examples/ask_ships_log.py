"""Three questions about a document of 5,000 tokens, answered with a tenth of the KV cache and with all of it."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
QUESTIONS = json.loads((ROOT / "examples/ships_log_questions.json").read_text(encoding="utf-8"))
OPTIONS = ["--budget", "10%"]


def main() -> None:
    """Run the command that the README shows, once for each question; further arguments are handed on."""
    for entry in QUESTIONS:
        words = ["ask", "examples/ships_log.txt", entry["question"], *OPTIONS, "--compare", "full"]
        words += ["--max-new-tokens", "30", *sys.argv[1:]]
        print(f"\n$ compresskv {shlex.join(words)}", flush=True)
        status = subprocess.run([sys.executable, "-m", "compresskv", *words], cwd=ROOT, check=False).returncode
        if status:
            sys.exit(status)


if __name__ == "__main__":
    main()
