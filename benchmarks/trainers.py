"""What ran in real trainers, as `make test-trainers` left it: see tests/trainers/conftest.py."""

from pathlib import Path

from benchmarks.records import Line, load
from benchmarks.summaries import table

FILE = Path(__file__).parent.parent / "docs" / "integrations" / "outcomes.jsonl"
NAMES = {"deepspeed": "DeepSpeed", "lightning": "Lightning"}


def used(_: str) -> str:
    """A row per project and version, then what ran of each."""
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in load(FILE):
        groups.setdefault((line["project"], line["version"]), []).append(line)
    rows, lists = [["project", "outcome on a CPU", "beside", "on"], ["---", "---", "---", "---"]], []
    for (project, version), lines in groups.items():
        title = f"{NAMES.get(project, project)} {version}"
        lists += ["", f"{title}:", "", *(f"- {what}" for what in dict.fromkeys(line["what"] for line in lines))]
        passed = sum(line["outcome"] == "passed" for line in lines)
        beside = ", ".join(f"{name} {number}" for name, number in lines[0]["beside"].items())
        of = f"{passed} of {len(lines)} tests passed"
        rows.append([title, of, beside, max(line["date"] for line in lines)])
    return table(rows) + "\n".join([*lists, ""])
