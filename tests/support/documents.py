"""Documents with measured parts: what lies between two marks is written by the command it names."""

from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def replace_between(document: Path, begin: str, end: str, text: str) -> None:
    """Put `text` between the document's two marks. Raises ValueError where one is missing."""
    before, rest = document.read_text(encoding="utf-8").split(begin, 1)
    _, after = rest.split(end, 1)
    document.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")
