"""Three questions about a document of about 5,000 tokens, answered with the full cache and with a few per cent of it."""

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
QUESTIONS = json.loads((HERE / "ships_log_questions.json").read_text(encoding="utf-8"))


def main() -> None:
    """Run the command that the README shows, once for each question; further arguments are handed on."""
    for entry in QUESTIONS:
        command = ["compresskv", "ask", "examples/ships_log.txt", entry["question"], "--compare", "full"]
        print(f'\n$ {" ".join(command[:3])} "{entry["question"]}" --compare full', flush=True)
        arguments = [str(HERE / "ships_log.txt"), *command[3:], "--max-new-tokens", "40", *sys.argv[1:]]
        subprocess.run([sys.executable, "-m", "compresskv", "ask", *arguments], check=True)


if __name__ == "__main__":
    main()
