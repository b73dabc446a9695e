"""The commands. Each parses, calls and prints; the work is elsewhere."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
import typer.core

from ego2robot import __version__, config
from ego2robot.errors import UserError, VideoError
from ego2robot.jobs import pool

EXIT_INTERRUPTED, EXIT_TERMINATED, EXIT_USER, EXIT_FOUND = 130, 143, 2, 1
MOST_WORKERS = 16  # that `status` lists
EXIT_DRAINED = 75  # EX_TEMPFAIL of sysexits.h: start it again
DISK_ERRORS = {
    errno.ENOSPC: "no space left",
    errno.EDQUOT: "disk quota used up",
    errno.EROFS: "read-only file system",
    errno.EACCES: "permission denied",
}


class Terminated(KeyboardInterrupt):
    """SIGTERM: like Ctrl-C, with its own exit code."""


class Commands(typer.core.TyperGroup):
    """Turns what a person can mend into one line on standard error and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        again = "what was complete is saved; run the same command again to go on"
        try:
            return super().invoke(ctx)
        except (UserError, VideoError) as error:
            _fail(str(error), EXIT_USER)
        except Terminated:
            _fail(f"terminated; {again}", EXIT_TERMINATED)
        except KeyboardInterrupt:
            _fail(f"interrupted; {again}", EXIT_INTERRUPTED)
        except BrokenPipeError:  # the reader of our output went away, as in `… | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(EXIT_FOUND)
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            where = f"{error.filename}: " if error.filename else ""
            _fail(f"{where}{DISK_ERRORS[error.errno]}; mend that: {again}", EXIT_USER)


app = typer.Typer(
    cls=Commands,
    rich_markup_mode=None,  # a wrong option is one line, not a box
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Turns first-person work video into robot-learning datasets.",
)
export_app = typer.Typer(no_args_is_help=True, help="Write a dataset from a run.")
models_app = typer.Typer(no_args_is_help=True, help="Model files that are not on a hub.")
bench_app = typer.Typer(no_args_is_help=True, help="What `make bench` and `make gpu-proof` measured.")
app.add_typer(export_app, name="export")
app.add_typer(models_app, name="models")
app.add_typer(bench_app, name="bench")
slurm_app = typer.Typer(no_args_is_help=True, help="A run as a chain of Slurm jobs.")
app.add_typer(slurm_app, name="slurm")

RunArg = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Such as clips.stride_s=6 gate.min_motion=0.02"),
]

Gpus = Annotated[
    str | None,
    typer.Option(metavar="all|N", help="One process on each of so many GPUs; there must be some."),
]


def _gpus(asked: str | None) -> list[str]:
    """``--gpus`` as a key of a recipe. Raises UserError for what is no number, and where there is no GPU."""
    if asked is None:
        return []
    if asked != "all" and (not asked.isdecimal() or asked == "0"):
        raise UserError(f"--gpus {asked}: give `all` or a number, such as 4")
    import torch

    if not torch.cuda.is_available():
        raise UserError(f"--gpus {asked}: torch sees no GPU; run `ego2robot doctor`, or leave it out")
    return [f"gpus={0 if asked == 'all' else asked}"]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"ego2robot {__version__}")
        raise typer.Exit


@app.command()
def run(
    recipe: Annotated[
        str, typer.Argument(help="A recipe's name (demo, folder, egocentric10k …) or a YAML file.")
    ],
    overrides: Overrides = None,
    fast: Annotated[
        bool | None,
        typer.Option("--fast/--exact", help="decode.mode: leave out pictures that no other refers to."),
    ] = None,
    gpus: Gpus = None,
) -> None:
    """Run a recipe: videos to clips, embeddings, skills, dataset, report. Goes on where it stopped."""
    mode = [] if fast is None else [f"decode.mode={'fast' if fast else 'exact'}"]
    cfg = config.load(recipe, [*(overrides or ()), *mode, *_gpus(gpus)])
    if gpus is not None and cfg.device == "cpu":
        raise UserError(f"--gpus {gpus}: the recipe says device=cpu; leave out one of the two")
    if cfg.device == "cpu" or not Path("/dev/nvidiactl").exists():  # on a GPU children are no forks
        pool.warm()
    from ego2robot import pipeline
    from ego2robot.console import display, funnel_text
    from ego2robot.report import funnel

    with display() as (show, tell):
        outcome = pipeline.run(cfg, show, tell)
    print(funnel_text(funnel(outcome.run)))
    _print_run_end(outcome)


@app.command()
def plan(
    recipe: Annotated[
        str, typer.Argument(help="A recipe's name (demo, folder, egocentric10k …) or a YAML file.")
    ],
    overrides: Overrides = None,
) -> None:
    """Make a recipe's run directory and plan, for `ego2robot work`. Again: adds the videos that are new."""
    cfg = config.load(recipe, overrides or ())
    from ego2robot import pipeline
    from ego2robot.console import display

    with display() as (show, tell):
        planned = pipeline.plan(cfg, show, tell)
    print(f"{cfg.run_dir}: {planned.n_units} units of {planned.videos} videos, {planned.added} of them new")


@app.command()
def work(
    run: RunArg,
    overrides: Overrides = None,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Where to begin, I from 0; everybody may do everything.")
    ] = None,
    gpus: Gpus = None,
) -> None:
    """Work on a planned run, with any number of others on any number of machines.

    Exit 75 at SIGTERM or SIGUSR1: what was complete is committed, start it again to go on.
    """
    from ego2robot.jobs.drain import Drain, Drained

    with Drain().on(signal.SIGTERM, signal.SIGUSR1) as drain:  # before what takes long to import
        from ego2robot import pipeline
        from ego2robot.console import display
        from ego2robot.jobs.claims import Shard

        where = Shard.parse(shard) if shard is not None else None
        with display() as (show, tell):
            try:
                pipeline.work(run, [*(overrides or ()), *_gpus(gpus)], where, drain, show, tell)
            except Drained:
                tell("drained: what was complete is committed; start it again to go on")
                raise typer.Exit(EXIT_DRAINED) from None
    print(f"{run}: every unit is committed")


@app.command()
def repair(run: RunArg, overrides: Overrides = None) -> None:
    """Drop what `verify` finds broken, and do exactly that again. Exit 1 if something is left."""
    from ego2robot import pipeline
    from ego2robot.console import display

    with display() as (show, tell):
        mended, verdict = pipeline.repair(run, overrides or (), show, tell)
    print(
        f"{mended.parts} parts and {mended.units} units dropped and done again, {mended.strays} files removed"
    )
    for problem in verdict.problems:
        print(f"problem: {problem}")
    if not verdict.ok:
        raise typer.Exit(EXIT_FOUND)


def _print_run_end(outcome: Any) -> None:
    skills = outcome.run.skills()
    if skills and skills["n_clips"]:
        note = ", random weights" if skills["random"] else ""
        print(f"skills   {skills['k']} from {skills['n_clips']} clips by {skills['embedding']}{note}")
    if outcome.export:
        e = outcome.export
        size = f"{e.bytes / 1e6:.1f} MB{_covered(e)}"
        print(f"dataset  {e.path}: {e.episodes} episodes, {e.frames} frames, {size}")
        for clip, reason in e.skipped:
            print(f"         clip {clip} left out: {reason}")
    print(f"report   {outcome.report}")
    for warning in outcome.warnings:
        _warn(warning)


ShardOption = Annotated[
    str | None,
    typer.Option(metavar="I/N", help="Only a share of the work, I from 0; a call without this ends it."),
]


@app.command()
def cluster(
    run: RunArg,
    overrides: Overrides = None,
    shard: ShardOption = None,
) -> None:
    """Find skills again, with other settings: ego2robot cluster RUN skills.k=20"""
    from ego2robot.console import display
    from ego2robot.progress import Progress
    from ego2robot.skills import Shard, cluster_shard
    from ego2robot.skills import cluster as find_skills
    from ego2robot.store.rundir import RunDir

    opened = RunDir.open(run)
    for item in overrides or ():
        if not item.startswith(("skills.", "seed=")):
            raise UserError(f"{item!r}: only skills.* and seed can change here; the rest is the run's own")
    cfg = config.build(config.apply(config.to_dict(opened.config), overrides or ()), "command line")
    if shard is not None:
        with display() as (show, _):
            left = cluster_shard(
                opened, cfg.skills, cfg.seed, Shard.parse(shard), lambda s: show(Progress(f"clustering: {s}"))
            )
        print(
            f"shard {shard} done, {left} parts of other shards left; the same command without --shard ends it"
        )
        return
    with display() as (show, _):
        found = find_skills(opened, cfg.skills, cfg.seed, lambda step: show(Progress(f"clustering: {step}")))
    for skill in found["skills"]:
        print(f"skill {skill['skill']:>3}  {skill['n']:>6} clips  {skill['name']}")
    if found["n_clips"]:
        score = found["silhouette"]
        quality = f", silhouette {score:.3f}" if score is not None else ""
        print(f"{found['k']} skills, {found['n_clips']} clips, by {found['embedding']}{quality}")
    if found["duplicates"] and found["duplicates"]["clips"]:
        alike = found["duplicates"]
        print(f"{alike['clips']} near-duplicates of {alike['groups']} clips (cosine ≥ {alike['cosine']:g})")
    for warning in found["warnings"]:
        _warn(warning)


@app.command()
def search(
    run: RunArg,
    query: Annotated[str, typer.Argument(help='A text, such as "tightening a screw", or the id of a clip.')],
    top: Annotated[int, typer.Option(min=1, max=100_000, help="So many clips.")] = 10,
    embedding: Annotated[
        Literal["auto", "videomae", "clip", "hand_motion"],
        typer.Option(help="In which a clip's neighbours are looked for; texts: always clip."),
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """The kept clips nearest to a text or to a clip, nearest first."""
    from ego2robot.console import found_text
    from ego2robot.search import search as look
    from ego2robot.store.rundir import RunDir

    answer = look(RunDir.open(run), query, top, embedding)
    print(json.dumps(answer.to_dict(), ensure_ascii=False) if as_json else found_text(answer))
    if answer.random:
        _warn(f"{answer.embedding} has random weights: this order means nothing")


OutArg = Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the dataset.")]
TopOption = Annotated[int | None, typer.Option(min=1, help="At most so many clips, best first.")]
WorkersOption = Annotated[
    int | None, typer.Option(min=0, max=1024, help="Processes; one per core without; 0: only this one.")
]
CodecOption = Annotated[Literal["av1", "h264"] | None, typer.Option(help="Of the videos.")]
HandsOption = Annotated[bool, typer.Option("--hands", help="With the landmarks of every frame.")]
BlurOption = Annotated[
    bool, typer.Option("--blur-faces", help="Cover the faces that are found, as export.blur_faces does.")
]
StripOption = Annotated[
    bool, typer.Option("--strip-metadata", help="Pseudonyms for names, as export.strip_metadata does.")
]
RepresentativesOption = Annotated[
    bool, typer.Option("--only-representatives", help="Leave out near-duplicates of a better clip.")
]


@export_app.command("lerobot")
def export_lerobot(
    run: RunArg,
    out: OutArg,
    top: TopOption = None,
    schema: Annotated[
        Literal["auto", "hands", "reference", "native"] | None,
        typer.Option(help="State and action; native: what the dataset itself measured."),
    ] = None,
    codec: CodecOption = None,
    action: Annotated[
        Literal["compensated", "wrist"] | None,
        typer.Option(help="Wrists without or with the camera's motion."),
    ] = None,
    workers: WorkersOption = None,
    shard: ShardOption = None,
    only_representatives: RepresentativesOption = False,
    blur_faces: BlurOption = False,
    strip_metadata: StripOption = False,
) -> None:
    """Write a LeRobot v3.0 dataset from a run's kept clips. Again: goes on where it was interrupted."""
    if workers != 0:
        pool.warm("ego2robot.export.lerobot_unit")
    from ego2robot.console import display
    from ego2robot.export.lerobot import export_lerobot as export
    from ego2robot.export.lerobot import export_lerobot_shard
    from ego2robot.jobs.claims import Shard
    from ego2robot.progress import paced
    from ego2robot.store.rundir import RunDir

    opened = _private(RunDir.open(run), blur_faces, strip_metadata)
    cfg = opened.config.export
    asked: dict[str, Any] = {
        "top": top or cfg.top,
        "schema": schema or cfg.schema,
        "codec": codec or cfg.codec,
        "action": action or cfg.action,
        "smooth": cfg.smooth,
        "workers": _export_workers(workers, opened),
        "only_representatives": only_representatives,
    }
    with display() as (show, _):
        if shard is not None:
            left = export_lerobot_shard(
                opened, out, shard=Shard.parse(shard), progress=paced("exporting", show), **asked
            )
        else:
            result = export(opened, out, progress=paced("exporting", show), **asked)
    if shard is not None:
        _print_share(shard, left)
        return
    size = f"{result.bytes / 1e6:.1f} MB{_covered(result)}"
    print(f"{out}: {result.episodes} episodes, {result.frames} frames, {size}")
    for clip, reason in result.skipped:
        print(f"clip {clip} left out: {reason}")
    for warning in result.warnings:
        _warn(warning)


@export_app.command("webdataset")
def export_webdataset(
    run: RunArg,
    out: OutArg,
    top: TopOption = None,
    shard_mb: Annotated[float, typer.Option(min=0.01, help="MiB of a shard at most.")] = 512,
    codec: CodecOption = None,
    hands: HandsOption = False,
    workers: WorkersOption = None,
    shard: ShardOption = None,
    only_representatives: RepresentativesOption = False,
    blur_faces: BlurOption = False,
    strip_metadata: StripOption = False,
) -> None:
    """Write kept clips as WebDataset shards: an MP4 and a JSON each. Without --top all of them."""
    if workers != 0:
        pool.warm("ego2robot.export.clips")
    from ego2robot.console import display
    from ego2robot.export.webdataset import export_webdataset as export
    from ego2robot.export.webdataset import export_webdataset_shard
    from ego2robot.jobs.claims import Shard
    from ego2robot.progress import paced
    from ego2robot.store.rundir import RunDir

    opened = _private(RunDir.open(run), blur_faces, strip_metadata)
    n, codec = _export_workers(workers, opened), codec or opened.config.export.codec
    with display() as (show, _):
        asked = (codec, hands, only_representatives, n, paced("exporting", show))
        if shard is not None:
            left = export_webdataset_shard(opened, out, top, Shard.parse(shard), *asked)
        else:
            result = export(opened, out, top, shard_mb, *asked)
    if shard is not None:
        _print_share(shard, left)
    else:
        _print_clips(out, result, "shards")


@export_app.command("parquet")
def export_parquet(
    run: RunArg,
    out: OutArg,
    top: TopOption = None,
    codec: CodecOption = None,
    hands: HandsOption = False,
    workers: WorkersOption = None,
    shard: ShardOption = None,
    only_representatives: RepresentativesOption = False,
    blur_faces: BlurOption = False,
    strip_metadata: StripOption = False,
) -> None:
    """Write kept clips as MP4 files with a Parquet table of them. Without --top all of them."""
    if workers != 0:
        pool.warm("ego2robot.export.clips")
    from ego2robot.console import display
    from ego2robot.export.clips_parquet import export_parquet as export
    from ego2robot.export.clips_parquet import export_parquet_shard
    from ego2robot.jobs.claims import Shard
    from ego2robot.progress import paced
    from ego2robot.store.rundir import RunDir

    opened = _private(RunDir.open(run), blur_faces, strip_metadata)
    n, codec = _export_workers(workers, opened), codec or opened.config.export.codec
    with display() as (show, _):
        asked = (codec, hands, only_representatives, n, paced("exporting", show))
        if shard is not None:
            left = export_parquet_shard(opened, out, top, Shard.parse(shard), *asked)
        else:
            result = export(opened, out, top, *asked)
    if shard is not None:
        _print_share(shard, left)
    else:
        _print_clips(out, result, "videos")


@export_app.command(
    "trajectories",
    # The guide's own flags, such as --output.max_frames=32, come through as arguments.
    context_settings={"ignore_unknown_options": True},
)
def export_trajectories(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SOURCE] [OUT]", help="Dataset and folder; keys too, such as --output.max_frames=16."
        ),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Kind of the source [default: egodex].")] = None,
    max_trajectories: Annotated[int | None, typer.Option(min=-1, help="At most so many; -1: all.")] = None,
    max_frames: Annotated[
        int | None, typer.Option(min=-1, help="Of each [default: 32]; -1: all its frames.")
    ] = None,
    blur_faces: Annotated[bool, typer.Option("--blur-faces", help="Cover the faces that are found.")] = False,
    strip_metadata: StripOption = False,
    config_file: Annotated[
        Path | None, typer.Option("--config", "--config_path", metavar="FILE.yaml", help="As of RFM.")
    ] = None,
) -> None:
    """Write trajectories for reward models (RFM, Robometer). Again: goes on; another name: another part."""
    pool.warm("ego2robot.export.trajectories")
    from ego2robot.export import trajectories_config

    places, overrides = trajectories_config.flags(arguments or ())
    if len(places) > 2:
        raise UserError(f"{places[2]!r}: one SOURCE and one OUT")
    named = zip(("dataset.dataset_path", "output.output_dir"), places, strict=False)
    given = {
        "dataset.kind": dataset,
        "output.max_trajectories": max_trajectories,
        "output.max_frames": max_frames,
        "output.blur_faces": blur_faces or None,
        "output.strip_metadata": strip_metadata or None,
    }
    asked = {key: value for key, value in given.items() if value is not None}
    settings = trajectories_config.load(config_file, {**overrides, **asked, **dict(named)})

    from ego2robot.console import display
    from ego2robot.export.trajectories import export_trajectories as export

    with display() as (show, tell):
        result = export(settings, show, tell)
    print(
        f"{result.path}: {result.trajectories} trajectories, {result.frames} frames, "
        f"{result.bytes / 1e6:.1f} MB in {result.shards} shards; {len(result.failed)} left out"
        f"{_covered(result)}"
    )
    for warning in result.warnings:
        _warn(warning)


def _print_share(shard: str, left: int) -> None:
    print(f"shard {shard} done, {left} units are left; the same command without --shard ends it")


def _print_clips(out: Path, result: Any, files: str) -> None:
    covered = _covered(result)
    print(f"{out}: {result.clips} clips, {result.files} {files}, {result.bytes / 1e6:.1f} MB{covered}")
    for clip, reason in result.skipped:
        print(f"clip {clip} left out: {reason}")
    for warning in result.warnings:
        _warn(warning)


def _private(opened: Any, blur_faces: bool, strip_metadata: bool) -> Any:
    """The run with what is asked for beside what its recipe asks for."""
    asked = opened.config.export
    export = dataclasses.replace(
        asked,
        blur_faces=asked.blur_faces or blur_faces,
        strip_metadata=asked.strip_metadata or strip_metadata,
    )
    opened.config = dataclasses.replace(opened.config, export=export)
    return opened


def _covered(result: Any) -> str:
    return "" if result.covered is None else f", faces covered in {result.covered} frames"


def _export_workers(asked: int | None, opened: Any) -> int:
    return asked if asked is not None else opened.config.workers or len(os.sched_getaffinity(0))


@app.command()
def push(
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="A folder that `export` wrote.")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="A dataset repository of the hub.")],
    private: Annotated[
        bool, typer.Option("--private", help="Only you can see a repository made new.")
    ] = False,
    part: Annotated[
        str | None, typer.Option(metavar="NAME", help="One of several datasets in the repository.")
    ] = None,
    licence: Annotated[
        str | None, typer.Option("--license", metavar="NAME", help="Where the source says none: cc-by-4.0 …")
    ] = None,
    permitted: Annotated[
        bool, typer.Option("--i-have-permission", help="The owner allows what the licence forbids.")
    ] = False,
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Else HF_TOKEN, or what `hf auth login` keeps.")
    ] = None,
) -> None:
    """Publish a dataset on the Hugging Face hub, with its card. Again: sends what is not there yet."""
    from ego2robot.export import hub

    checked = hub.inspect(dataset, licence, permitted)
    token = hub.read_token(token_file)
    # The hub's own library shows how far it is.
    done = hub.push(checked, repo, token, private, part, tell=lambda text: print(text, file=sys.stderr))
    removed = f", {done.removed} old ones removed" if done.removed else ""
    print(f"{done.url}: {done.files} files, {done.bytes / 1e6:.1f} MB, {done.licence}{removed}")


@app.command()
def check(
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="A LeRobot v3.0 folder, anybody's.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for check.json and check.svg; default DATASET-check.")
    ] = None,
    camera: Annotated[
        str | None, typer.Option(help="The video feature to look at; default the first.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Networks, each on another split.")] = 3,
    max_steps: Annotated[
        int, typer.Option(min=1, help="Batches of 64 that each is trained on at most.")
    ] = 1500,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option()] = "auto",
) -> None:
    """Can actions be learnt from pictures? Exit 0: learnable, 1: not, 2: cannot tell, or an error."""
    from ego2robot.check import Options, picture, words
    from ego2robot.check import check as judge
    from ego2robot.console import display
    from ego2robot.store import atomic

    out = out or dataset.absolute().with_name(f"{dataset.absolute().name}-check")
    with display() as (show, _):
        verdict = judge(dataset, Options(camera, seeds, most_steps=max_steps, device=device), show)
    atomic.write_json(out / "check.json", verdict.to_dict())
    atomic.write_text(out / "check.svg", picture.svg(verdict))
    print(words.text(verdict))
    print(f"figures  {out / 'check.json'}\ncurves   {out / 'check.svg'}")
    for warning in verdict.warnings:
        _warn(warning)
    if not verdict.learnable:
        raise typer.Exit(EXIT_FOUND)


@app.command()
def report(
    run: RunArg,
    out: Annotated[Path | None, typer.Argument(help="HTML file; default RUN/report.html.")] = None,
) -> None:
    """Write the page a person looks at."""
    from ego2robot.console import display
    from ego2robot.progress import Progress
    from ego2robot.report import write_report
    from ego2robot.store.rundir import RunDir

    opened = RunDir.open(run)
    with display() as (show, _):
        path = write_report(opened, out, lambda done, total: show(Progress("reporting", done, total)))
    print(path)


@app.command()
def verify(
    run: RunArg,
    truth: Annotated[
        Path | None, typer.Option(help="Folder of `ego2robot sample`: also score the gate against its truth.")
    ] = None,
) -> None:
    """Prove that a run adds up: rows, checksums, ids, vectors. Exit 1 and one line a problem if not."""
    from ego2robot.jobs.verify import verify as check
    from ego2robot.store.rundir import RunDir

    opened = RunDir.open(run)
    verdict = check(opened)
    for problem in verdict.problems:
        print(f"problem: {problem}")
    print(
        f"{verdict.planned} clips planned = {verdict.kept} kept + {verdict.dropped} dropped + "
        f"{verdict.failed} failed + {verdict.left} left; {verdict.files} files, {verdict.rows} rows: "
        + ("all checks passed" if verdict.ok else f"{len(verdict.problems)} problems")
    )
    if truth:
        from ego2robot.sample import load_truths, score_gate

        print(score_gate(opened.table("clips"), load_truths(truth)).text())
    if not verdict.ok:
        raise typer.Exit(EXIT_FOUND)


@app.command()
def status(
    run: RunArg,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Again and again, until it is done.")] = False,
    every: Annotated[float, typer.Option(min=0.5, help="Seconds between, with --watch.")] = 5.0,
) -> None:
    """How far a run is and who works on it, from any machine that sees its directory."""
    import time

    from ego2robot.jobs.status import status as look
    from ego2robot.store.rundir import RunDir

    opened = RunDir.open(run)
    while True:
        s = look(opened)
        if watch and sys.stdout.isatty():
            print("\033[H\033[2J", end="")
        if as_json:
            print(json.dumps(s.to_dict()), flush=True)
        else:
            _print_status(s)
        if not watch or s.state in ("curated", "finished"):
            return
        time.sleep(every)


def _print_status(s: Any) -> None:
    from ego2robot.console import duration

    print(f"{s.run}: {s.state}")
    print(f"clips      {s.clips_done}/{s.clips}: {s.kept} kept, {s.dropped} dropped, {s.failed} failed")
    print(f"units      {s.units_done}/{s.units} of {s.videos} videos")
    if s.clips_per_s is not None and s.video_hours_per_hour is not None:
        eta = f", ETA {duration(s.eta_s)}" if s.eta_s is not None else ""
        print(f"rate       {s.clips_per_s:.2f} clips/s, {s.video_hours_per_hour:.1f} video-h/h{eta}")
    if waits := [f"{name} {share:.0%}" for name, share in s.stalls.items() if share >= 0.01]:
        print(f"stalls     {', '.join(waits)} of its time")
    here = [worker for worker in s.workers if worker.here]
    for worker in here[:MOST_WORKERS]:
        rate = f"{worker.clips_per_s:.2f} clips/s" if worker.clips_per_s else "no rate yet"
        gpu = "".join(
            f", GPU {g['index']:g}: {g.get('utilization.gpu', 0):g} %, "
            f"video engines {g.get('utilization.decoder', 0):g} %"
            for g in worker.gpus
        )
        silent = f", silent for {duration(worker.age_s)}" if worker.age_s > 60 else ""
        print(f"worker     {worker.name}: {rate}{', slow' if worker.slow else ''}{silent}{gpu}")
    if len(here) > MOST_WORKERS:
        print(f"           and {len(here) - MOST_WORKERS} more, faster ones")
    if s.retried:
        print("retried    " + ", ".join(f"{n} {kind}" for kind, n in s.retried.items()))
    if s.refused:
        print("quarantine " + ", ".join(f"{n} {kind}" for kind, n in s.refused.items()))
    print("embeddings " + (", ".join(s.embeddings) or "none yet"))
    if s.skills is not None:
        print(f"skills     {s.skills}")
    if s.episodes is not None:
        print(f"dataset    {s.episodes} episodes")


@app.command()
def sample(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the videos and their truth.")],
    minutes: Annotated[float, typer.Option(min=0.05, help="Of footage.")] = 3.0,
    videos: Annotated[int, typer.Option(min=1, help="Split over so many files.")] = 1,
    codec: Annotated[Literal["h264", "hevc", "vp9", "av1"], typer.Option()] = "h264",
    gop: Annotated[int, typer.Option(min=1, help="Frames from keyframe to keyframe.")] = 30,
    bframes: Annotated[int, typer.Option(min=0, max=16)] = 0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Make first-person-like 1080p footage with known truth, for trying things out and for benchmarks."""
    from ego2robot.console import display
    from ego2robot.progress import Progress
    from ego2robot.sample import make_footage

    with display() as (show, _):
        made = make_footage(
            out,
            minutes=minutes,
            videos=videos,
            codec=codec,
            gop=gop,
            bframes=bframes,
            seed=seed,
            progress=lambda share: show(Progress("making footage", round(100 * share), 100)),
        )
    print(made.text())


SbatchArgs = Annotated[
    list[str] | None,
    typer.Option(
        "--sbatch-arg", metavar="ARG", help="For all jobs, or STEP:ARG, such as cluster:--mem=200G."
    ),
]


@slurm_app.command("submit")
def slurm_submit(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or a YAML file.")],
    overrides: Overrides = None,
    array: Annotated[int, typer.Option(min=1, help="Tasks that work at the same time.")] = ...,  # type: ignore[assignment]
    throttle: Annotated[int | None, typer.Option(min=1, help="At most so many of them at once.")] = None,
    export_tasks: Annotated[
        int | None, typer.Option(min=1, help="Tasks that export at the same time [default: as many as work].")
    ] = None,
    gpus_per_task: Annotated[str, typer.Option(metavar="[TYPE:]G")] = "0",
    cpus_per_task: Annotated[int | None, typer.Option(min=1)] = None,
    mem: Annotated[str | None, typer.Option(help="Of a task, such as 64G.")] = None,
    time: Annotated[
        str | None, typer.Option(help="Of a task, such as 4:00:00; it goes on where it stopped.")
    ] = None,
    partition: Annotated[str | None, typer.Option(envvar="SBATCH_PARTITION")] = None,
    account: Annotated[str | None, typer.Option(envvar="SBATCH_ACCOUNT")] = None,
    qos: Annotated[str | None, typer.Option(envvar="SBATCH_QOS")] = None,
    constraint: Annotated[str | None, typer.Option(envvar="SBATCH_CONSTRAINT")] = None,
    exclude: Annotated[str | None, typer.Option(help="Nodes to stay away from.")] = None,
    sbatch_args: SbatchArgs = None,
    export_env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A variable that the jobs get too, such as HF_TOKEN."),
    ] = None,
    plan_here: Annotated[bool, typer.Option(help="Plan now and here, not in a job.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Print scripts and commands; needs no Slurm.")] = False,
) -> None:
    """Submit plan → work array → cluster → export array → finish → report as one chain."""
    from ego2robot.jobs import slurm

    given = list(overrides or ())
    if cpus_per_task and not any(item.startswith("workers=") for item in given):
        given.append(f"workers={cpus_per_task}")
    cfg = config.load(recipe, given)
    request = slurm.Request(
        array=array,
        throttle=throttle,
        export_tasks=export_tasks,
        gpus_per_task=gpus_per_task,
        cpus_per_task=cpus_per_task,
        mem=mem,
        time=time,
        partition=partition,
        account=account,
        qos=qos,
        constraint=constraint,
        exclude=exclude,
        sbatch_args=tuple(sbatch_args or ()),
        environment=tuple(export_env or ()),
    )
    if dry_run:
        print(slurm.draft_run(cfg, request, slurm.ego2robot_command(), plan_here).text(), end="")
    else:
        _print_submission(slurm.submit(cfg, request, plan_here))


@slurm_app.command("retry")
def slurm_retry(
    run: RunArg,
    throttle: Annotated[int | None, typer.Option(min=1, help="At most so many tasks at once.")] = None,
    mem: Annotated[str | None, typer.Option()] = None,
    time: Annotated[str | None, typer.Option()] = None,
    partition: Annotated[str | None, typer.Option()] = None,
    exclude: Annotated[str | None, typer.Option(help="Nodes to stay away from.")] = None,
    sbatch_args: SbatchArgs = None,
    dry_run: Annotated[bool, typer.Option(help="Print scripts and commands.")] = False,
) -> None:
    """Submit again what failed or is left, and the steps after it; options replace those of before."""
    from ego2robot.jobs import slurm

    options = {"throttle": throttle, "mem": mem, "time": time, "partition": partition, "exclude": exclude}
    changes: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    changes["sbatch_args"] = tuple(sbatch_args or ())
    if dry_run:
        chain, replaced = slurm.draft_retry(run, changes, slurm.ego2robot_command())
        print(chain.text(), end="")
        for job in replaced:
            _warn(f"job {job} waits for what failed; retry cancels it")
    else:
        _print_submission(slurm.retry(run, changes))


def _print_submission(submission: Any) -> None:
    for job in submission.jobs:
        size = f", {len(job.shards)} tasks" if job.shards else ""
        print(f"{job.step:<8} job {job.job_id}{size}")
    print(f"scripts  {submission.folder}")
    print(f"logs     {submission.tail}")


@slurm_app.command("status")
def slurm_status(
    run: RunArg, as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False
) -> None:
    """What Slurm says of the jobs of a run, and how far the run is."""
    from ego2robot.console import duration
    from ego2robot.jobs import slurm

    seen = slurm.overview(run)
    if as_json:
        print(json.dumps(seen.to_dict()))
        return
    if not seen.tasks:
        print("no job was submitted for this run")
    for step in slurm.STEPS:
        tasks = [task for task in seen.tasks if task.step == step]
        if tasks:
            states = ", ".join(f"{n} {state.lower()}" for state, n in seen.states(step).items())
            jobs = ", ".join(dict.fromkeys(task.job.split("_")[0] for task in tasks))
            why = next((f" ({task.reason})" for task in tasks if task.active and task.reason), "")
            print(f"{step:<8} job {jobs}: {states}{why}")
    if p := seen.progress:
        eta = f", ETA {duration(p['eta_s'])}" if p["eta_s"] is not None else ""
        print(
            f"run      {p['clips_done']}/{p['clips']} clips, {p['units_done']}/{p['units']} units: "
            f"{p['kept']} kept, {p['dropped']} dropped, {p['failed']} failed{eta}"
        )
    else:
        print("run      no plan yet")


@slurm_app.command("failed")
def slurm_failed(
    run: RunArg, lines: Annotated[int, typer.Option(min=0, help="Of each task's log.")] = 3
) -> None:
    """Tasks that ended badly: state, exit code, node and the end of the log. Exit 1 if there are any."""
    from ego2robot.jobs import slurm

    failed = slurm.failures(run)
    never = Counter(task.step for task in failed if task.never_began)
    for task in (task for task in failed if not task.never_began):
        shard = "" if task.shard is None else f" shard {task.shard}"
        code = f", exit {task.exit_text}" if task.exit_text else ""
        node = f" on {task.node}" if task.node else ""
        print(f"{task.step}{shard}: job {task.job} {task.state}{code}{node}; {task.log}")
        for line in task.last_lines(lines):
            print(f"    {line}")
    for step, n in never.items():
        print(f"{step}: {n} tasks cancelled before they began")
    if failed:
        raise typer.Exit(EXIT_FOUND)
    print("no task failed")


@slurm_app.command("cancel")
def slurm_cancel(run: RunArg) -> None:
    """Take the jobs of a run out of the queue; what is complete is kept, `slurm retry` goes on."""
    from ego2robot.jobs import slurm

    jobs = slurm.cancel(run)
    print(f"cancelled {', '.join(jobs)}" if jobs else "no job of this run is in the queue")


@slurm_app.command("ready", hidden=True)
def slurm_ready(run: RunArg) -> None:
    """For the script of `cluster`: exit 1 while units are left."""
    from ego2robot.jobs import slurm

    left = slurm.units_left(run)
    if left is None:
        raise UserError(f"{run}: no plan; see `ego2robot slurm failed`, then `slurm retry`")
    if left:
        raise UserError(f"{run}: {left} units are left; see `ego2robot slurm failed`, then `slurm retry`")


@models_app.command("pull")
def models_pull(
    wheel: Annotated[
        Path | None, typer.Option(help="A mediapipe 0.10.21 wheel that is already here.")
    ] = None,
) -> None:
    """Fetch MediaPipe's hand models from its wheel, and check them."""
    from ego2robot import models

    print(models.pull(wheel=wheel))


@bench_app.command("compare")
def bench_compare(
    before: Annotated[Path, typer.Argument(metavar="A", help="A result of benchmarks/results.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
) -> None:
    """Each ratio in both results, and its change in %."""
    from ego2robot import bench

    a, b = bench.read(before), bench.read(after)
    if a.machine != b.machine:
        _warn(f"{a.machine} and {b.machine} are different machines")
    for line in bench.table(bench.compare(a, b)):
        print(line)


@bench_app.command("check")
def bench_check(
    folder: Annotated[Path, typer.Argument(help="Of results.")] = Path("benchmarks/results"),
) -> None:
    """Compare the newest result with the committed one before it, of the same kind of machine.

    Exit 1 when a ratio dropped by more than 10 %, or failed to be measured.
    """
    from ego2robot import bench

    verdicts = bench.check(folder)
    for verdict in verdicts:
        since = f"since {verdict.before.name}" if verdict.before else "the first of its machine"
        print(f"{verdict.after.name}: {since}")
        for line in bench.table(verdict.changes):
            print(line)
    drops = [(verdict, change) for verdict in verdicts for change in verdict.drops]
    for verdict, change in drops:
        sys.stderr.write(f"error: {verdict.after.name}: {change.text()}\n")
    if drops:
        raise typer.Exit(EXIT_FOUND)


@app.command()
def doctor() -> None:
    """What this machine can do, and what to install for what it cannot."""
    from ego2robot.doctor import doctor as look

    group = ""
    for finding in look(Path.cwd()):
        if finding.group != group:
            group = finding.group
            print(group)
        mark = {True: "yes", False: "NO ", None: " - "}[finding.ok]
        hint = f"  → {finding.hint}" if finding.hint else ""
        print(f"  {mark} {finding.name}: {finding.text}{hint}")


@app.command()
def recipes() -> None:
    """List the recipes that can be named."""
    for name, path in config.recipes().items():
        first = path.read_text(encoding="utf-8").splitlines()[0]
        print(f"{name:<16} {first.lstrip('# ')}")


def _warn(text: str) -> None:
    sys.stderr.write(f"warning: {text}\n")


def _fail(text: str, code: int) -> NoReturn:
    for line in text.splitlines():
        sys.stderr.write(f"error: {line}\n")
    sys.stderr.flush()
    sys.exit(code)


def _terminate(_signal: int, _frame: object) -> NoReturn:
    raise Terminated


def main() -> None:
    """The console command. Users' mistakes end in one line and exit 2, bugs in a traceback."""
    signal.signal(signal.SIGTERM, _terminate)
    app()


if __name__ == "__main__":
    main()
