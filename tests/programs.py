"""What the tests of the launchers share."""

from pathlib import Path

ODD = ["python", "a  b", "x;y", "$HOME", "it's"]  # words that a shell would take apart


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path
