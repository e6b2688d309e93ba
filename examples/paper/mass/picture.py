"""The picture of the study `mass`, from its record alone."""

from typing import TYPE_CHECKING

from examples.paper.mass.page import FORMS, mean_curve, outside
from examples.paper.study import Record
from examples.paper.summary import interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = dict(zip(FORMS, ("tab:red", "black", "tab:green", "tab:orange", "tab:blue", "tab:purple")))


def draw(record: Record) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.2, 7), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[1, 1.15])
    upper.suptitle("A student smaller than its teacher", fontsize=11)
    units = {"student_mass": "mass outside S", "student_entropy": "entropy, nats", "full": "full reverse KL, nats"}
    for panel, (name, label) in zip(upper.subplots(1, 3), units.items()):
        curves_panel(record, name, panel)
        panel.set(xlabel="training step", ylabel=label, ylim=(0, None))
    upper.legend(*upper.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    lower.suptitle(f"What makes it leak: {record['size']['short']:,} steps in each setting", fontsize=11)
    settings_panel(record, lower.subplots())
    lower.legend(loc="outside lower center", ncols=3, fontsize=9)
    return figure


def curves_panel(record: Record, name: str, panel: "Axes") -> None:
    for form, run in record["runs"].items():
        values = mean_curve(run, name)
        drawn = outside(values) if name == "student_mass" else values
        panel.plot(run["steps"], drawn, color=COLOURS[form], label=FORMS[form])
    if name in record["teacher"]:
        mean = interval(record["teacher"][name])[0]
        panel.axhline(1 - mean if name == "student_mass" else mean, color="0.6", ls=":", label="the teacher")
    panel.set_xscale("symlog", linthresh=1)
    panel.set_xlim(0, record["runs"]["renormalized"]["steps"][-1])


def settings_panel(record: Record, panel: "Axes") -> None:
    names = list(record["settings"])[::-1]
    looks = {"start": ("0.6", "o", "before training"), "renormalized": (COLOURS["renormalized"], "D", "renormalised")}
    looks["tail"] = (COLOURS["tail"], "s", "tail class")
    for when, (colour, marker, label) in looks.items():
        values = [interval(outside(record["settings"][name][when]["student_mass"]))[0] for name in names]
        panel.scatter(values, range(len(names)), color=colour, marker=marker, label=label, zorder=3)
    panel.set_yticks(range(len(names)), names)
    panel.grid(axis="x", color="0.9")
    panel.set(xlabel="mass outside S", xlim=(0, None))
