"""How does this CPU do the work, against the staged way, against two peers, against its own decoder?

Runs every part in a process of its own, writes ``results/<date>-<machine>.json``: the machine, all figures,
the comparisons under ``ratios``, and under ``skipped`` why one is missing. Draws ``docs/bench.png`` from all
committed results. The footage is made before the clock starts, once, and how long that took is told apart.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import CACHE, RESULTS, Outcome, Part, Skip, figure, machine, run_part, stopwatch, write_report

from ego2robot.bench import FLOORS, RATIOS, results, summary, trend

CHART = Path(__file__).parents[1] / "docs" / "bench.png"
PACKAGES = (
    "torch", "av", "transformers", "numpy", "pyarrow", "opencv-contrib-python", "mediapipe", "decord",
    "torchcodec", "daft", "ray",
)  # fmt: skip
FOOTAGE = Part("footage", "bench", 1800, "prepare")  # before the clock starts, and kept
# In order of worth: what comes last goes without when the time is up.
PARTS = (
    Part("end_to_end", "end_to_end", 360),
    Part("decode", "decode", 90, quick=True),
    Part("triage", "triage", 240, "triage", quick=True),
    Part("daft", "peers_daft", 150),
    Part("ray", "peers_ray", 150),
    Part("hands", "hands", 60, quick=True),
    Part("kernels", "kernels", 60, quick=True),
)
SOURCES = {
    "cpu_end_to_end_vs_staged": "end_to_end",
    "cpu_curation_vs_staged": "end_to_end",
    "cpu_curation_with_triage_vs_staged": "triage",
    "cpu_end_to_end_vs_staged_parallel": "end_to_end",
    "cpu_curation_vs_staged_parallel": "end_to_end",
    "cpu_end_to_end_vs_daft": "daft",
    "cpu_end_to_end_vs_ray": "ray",
    "cpu_decode_vs_libav": "decode",
    "triage_speedup": "triage",
    "triage_recall": "triage",
    "decisions_agree": "end_to_end",
}


def prepare(quick: bool) -> dict[str, Any]:
    """Makes the footage of all parts, where it is not there yet: seconds by part, nearly none where it is."""
    import decode
    import end_to_end
    import triage

    seconds: dict[str, float] = {}
    with stopwatch(seconds, "end_to_end"):
        end_to_end.footage(quick)
    with stopwatch(seconds, "decode"):
        decode.footage(decode.SECONDS)
    with stopwatch(seconds, "triage"):
        triage.footage(triage.MINUTES[True])
    return {"seconds_to_make": {part: round(of, 1) for part, of in seconds.items()}}


def ratios_of(
    outcomes: Mapping[str, Outcome], sources: Mapping[str, str]
) -> tuple[dict[str, float], dict[str, str]]:
    """The ratios that were measured, and why the others were not."""
    ratios: dict[str, float] = {}
    skipped: dict[str, str] = {}
    for name, part in sources.items():
        outcome = outcomes.get(part)
        value = figure(outcome.figures, name) if outcome else None
        if value is not None and math.isfinite(value):
            ratios[name] = value
        elif outcome is None:
            skipped[name] = f"{part} was not run"
        else:
            skipped[name] = outcome.reason or f"failed: {part} gave no {name}"
    for name in RATIOS.keys() - ratios.keys() - skipped.keys():
        skipped[name] = "needs a GPU: make gpu-proof" if name.startswith("gpu_") else "make bench measures it"
    return ratios, {name: skipped[name] for name in RATIOS if name in skipped}


def against_peers(outcomes: Mapping[str, Outcome]) -> None:
    """Adds to each peer's figures the ratio of its time to ours, by clip, and the share of its decisions that
    are ours too."""
    mine = outcomes["end_to_end"].figures if "end_to_end" in outcomes else None
    for name in ("daft", "ray"):
        theirs = outcomes[name].figures if name in outcomes else None
        if mine and theirs:
            decided = {clip: one["kept"] for clip, one in theirs.pop("decisions").items()}
            ours = mine["ours"]["all"]["seconds"] * len(decided) / len(mine["decisions"])
            theirs[f"cpu_end_to_end_vs_{name}"] = round(theirs["seconds"] / ours, 3)
            same = sum(mine["decisions"][clip] == kept for clip, kept in decided.items())
            theirs["same_decisions_as_ours"] = round(same / len(decided), 4)


def run_all(parts: Sequence[Part], quick: bool, minutes: float) -> dict[str, Outcome]:
    """Each part, the later ones as far as the time goes. Says how each one ended.

    Args:
        minutes: for all of them; the budgets of parts are for ten, and stretch with it.
    """
    until = time.monotonic() + 60 * minutes
    outcomes: dict[str, Outcome] = {}
    for part in parts:
        left = until - time.monotonic()
        if left < 10:
            outcomes[part.name] = Outcome(part.name, 0.0, None, "no time was left for it")
        else:
            shorter = replace(part, budget_s=min(part.budget_s * max(minutes / 10, 1), left))
            outcomes[part.name] = run_part(shorter, quick or part.quick)
        outcome = outcomes[part.name]
        print(f"{part.name:<12} {outcome.seconds:6.1f} s  {outcome.reason or 'measured'}", flush=True)
    return outcomes


def report_of(outcomes: Mapping[str, Outcome], sources: Mapping[str, str]) -> dict[str, Any]:
    """What a file of results holds besides the machine."""
    ratios, skipped = ratios_of(outcomes, sources)
    missing = {name: o.reason for name, o in outcomes.items() if o.reason}
    return {
        "ratios": ratios,
        "skipped": {**skipped, **missing},
        "seconds": {name: round(outcome.seconds, 1) for name, outcome in outcomes.items()},
        "sections": {name: o.figures for name, o in outcomes.items() if o.figures is not None},
    }


def draw(folder: Path, path: Path) -> None:
    """The trend of every ratio over all results, one small chart each, floors dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = trend(results(folder))
    if not lines:
        raise Skip("no results to draw")
    dates = sorted(
        {date for machines in lines.values() for points in machines.values() for date, _ in points}
    )
    machines = sorted({name for of in lines.values() for name in of})
    colours = dict(zip(machines, pyplot.colormaps["tab10"].colors * 3, strict=False))
    columns = min(4, len(lines))
    rows = -(-len(lines) // columns)
    figure_, axes = pyplot.subplots(
        rows, columns, figsize=(3.4 * columns, 2.5 * rows + 0.6), squeeze=False, layout="constrained"
    )
    for ax in axes.flat[len(lines) :]:
        ax.axis("off")
    for ax, (name, of) in zip(axes.flat, lines.items(), strict=False):
        share = name in ("triage_recall", "decisions_agree")  # of interest near 1 alone
        for machine_name, points in of.items():
            at = [dates.index(date) for date, _ in points]
            values = [value for _, value in points]
            ax.plot(at, values, "o-", color=colours[machine_name], markersize=5, linewidth=1.6)
            text = f"{values[-1]:,.0f}" if values[-1] >= 100 else f"{values[-1]:.{3 if share else 2}f}"
            ax.annotate(
                text, (at[-1], values[-1]), (0, 7), textcoords="offset points", ha="center", fontsize=9
            )
        drawn = [value for points in of.values() for _, value in points]
        highest = max(drawn)
        if name in FLOORS:
            ax.axhline(FLOORS[name], color="0.45", linestyle="--", linewidth=1)
            highest = max(highest, FLOORS[name])
        ax.set_ylim(*((min(0.95, *drawn) - 0.01, 1.02) if share else (0, 1.25 * highest)))
        ax.set_xlim(-0.6, len(dates) - 0.4)
        ax.set_xticks(range(len(dates)), [date[5:] for date in dates], fontsize=8)
        ax.tick_params(axis="y", labelsize=8)
        ax.set_title(name.replace("_", " "), fontsize=9.5)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="0.92")
        ax.set_axisbelow(True)
    handles = [pyplot.Line2D([], [], color=colours[m], marker="o", label=m) for m in machines]
    handles.append(pyplot.Line2D([], [], color="0.45", linestyle="--", linewidth=1, label="what must hold"))
    figure_.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    figure_.savefig(path, dpi=110)
    pyplot.close(figure_)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="less footage, one turn: to see that it works")
    parser.add_argument("--minutes", type=float, default=10, help="that all parts together may take")
    parser.add_argument("--only", help="parts, separated by commas")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--chart", type=Path, default=CHART)
    parser.add_argument("--draw", action="store_true", help="only draw the chart again")
    args = parser.parse_args()
    if not args.draw:
        CACHE.mkdir(parents=True, exist_ok=True)
        made = run_all([FOOTAGE], args.quick, 30)
        (CACHE / "job.json").unlink(missing_ok=True)  # of an earlier run: the peers do this one's work
        wanted = args.only.split(",") if args.only else [part.name for part in PARTS]
        parts = [part for part in PARTS if part.name in wanted]
        outcomes = made | run_all(parts, args.quick, args.minutes)
        against_peers(outcomes)
        body = {"quick": args.quick, **report_of(outcomes, SOURCES)}
        path = write_report(__doc__.splitlines()[0], machine(PACKAGES), body, False, args.out)
        print("\n".join(summary(body["ratios"], body["skipped"])))
        print(path)
    try:
        draw(args.out, args.chart)
    except (ModuleNotFoundError, Skip) as error:
        print(f"no chart: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
