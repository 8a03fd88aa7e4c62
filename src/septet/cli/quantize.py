"""`septet quantize`: a model in, a septet directory out."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from septet.cli.app import app
from septet.cli.calibration import calibrate_with, calibration_name
from septet.cli.device import check_device, let_segments_grow, quantizer_on
from septet.cli.options import Activations, JsonOption
from septet.cli.output import note, print_json, progress_bar, quiet_libraries

if TYPE_CHECKING:
    from septet.checkpoint import QuantizeOptions

__all__ = ["quantize", "quantize_with_bar"]


_EFFORT_HELP = (
    "0: plain rounding. 1: error feedback. 2: also follows what errors matter for, and how far inputs have moved. 3: more text, and widths "
    "by layer where they win."
)


class Code(str, Enum):
    """What the bits of a pair mean."""

    trellis = "trellis"
    split = "split"


class Head(str, Enum):
    """What happens to the output head."""

    int8 = "int8"
    trellis = "trellis"
    keep = "keep"


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(help="A Hugging Face directory, a hub id, or a .gguf file (dequantized first).")],
    out: Annotated[Path, typer.Argument(help="The directory to make; it must not exist.")],
    code: Annotated[Code, typer.Option(help="trellis: better; split: simpler and quicker.")] = Code.trellis,
    bits: Annotated[float, typer.Option(help="Average bits per weight of the linear layers: 3 to 4 (split: 3.5).")] = 3.5,
    effort: Annotated[int | None, typer.Option(help=_EFFORT_HELP, show_default="2", min=0, max=3)] = None,
    calibration: Annotated[
        str | None, typer.Option(help="A text file; self: text that the model writes; none: effort 0.", show_default="self")
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(help="About how many; 0: the effort's own number.", min=0)] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N: where to compute; several GPUs: cuda:0,cuda:1.")] = "cpu",
    head: Annotated[Head, typer.Option(help="The output head and an embedding tied to it.")] = Head.int8,
    activations: Annotated[Activations, typer.Option(help="What the model will do with activations by default.")] = Activations.int8,
    seed: Annotated[int, typer.Option(help="Seed of the random signs.")] = 0,
    threads: Annotated[int, typer.Option(help="0: SEPTET_THREADS, OMP_NUM_THREADS, or all. The result is the same.", min=0, max=1024)] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Quantize a model."""
    if device != "cpu":
        let_segments_grow()
    check_device(device)
    from septet import checkpoint
    from septet.checkpoint.options import allocation_of

    effort, calibration = effort_and_calibration(effort, calibration)
    options = checkpoint.QuantizeOptions(
        code=code.value,
        bits_per_weight=bits,
        allocation=allocation_of(bits),
        effort=effort,
        head=head.value,
        activations=activations.value,
        seed=seed,
        calibration=calibration_name(calibration),
        calibration_tokens=calibration_tokens,
    )
    started = time.perf_counter()
    run = quantize_best if effort == 3 else quantize_with_bar
    worked = run(source, out, options, resume, threads, calibration, device)
    seconds = time.perf_counter() - started
    totals = checkpoint.inspect(out)["totals"]
    if as_json:
        print_json({"out": str(out), "already_finished": not worked, "seconds": seconds, **options.as_json(), "totals": totals})
    elif not worked:
        note(f"{out} was finished already")
    else:
        size = totals["size_bytes_total"] / 1e6
        note(f"{out}: {size:.1f} MB in {seconds:.0f} s")
        note(f"bits per weight: {totals['effective_bits']:.4f} in the linear layers, {totals['effective_bits_total']:.4f} in all")


def effort_and_calibration(effort: int | None, calibration: str | None) -> tuple[int, str]:
    """What is meant by options that may have been left out.

    Args:
        effort: 0 to 3; None: 0 without calibration, else 2.
        calibration: a text file, "self", "none"; None: as the effort needs.
    """
    if effort is None:
        effort = 0 if calibration == "none" else 2
    if calibration is None:
        calibration = "self" if effort else "none"
    return effort, calibration


def quantize_best(
    source: str,
    out: Path,
    options: QuantizeOptions,
    resume: bool = False,
    threads: int = 0,
    calibration: str = "self",
    device: str = "cpu",
) -> bool:
    """Quantize with one width for all layers and with measured widths, and keep what loses less on text that neither has seen.

    Both are made beside OUT; arguments and result are those of `quantize_with_bar`.
    """
    from septet.checkpoint.directory import read_json
    from septet.checkpoint.integrity import HASHES_NAME

    if out.exists() or options.bits_per_weight != 3.5 or options.code != "trellis":
        if resume and options.bits_per_weight == 3.5 and (out / HASHES_NAME).is_file():
            # A finished run has kept one of the two; which one is no difference between commands.
            made = read_json(out / HASHES_NAME).get("options")
            if made == options.as_json() | {"allocation": "measured"}:
                options = replace(options, allocation="measured")
        return quantize_with_bar(source, out, options, resume, threads, calibration, device)
    from septet.cli.trial import divergence_on_own_text

    losses: dict[str, float] = {}
    for allocation in ("uniform", "measured"):
        place = out.with_name(f"{out.name}.{allocation}")
        chosen = replace(options, allocation=allocation)
        quantize_with_bar(source, place, chosen, resume or place.exists(), threads, calibration, device)
        losses[allocation] = divergence_on_own_text(source, place, options.seed + 1, threads, device)
        note(f"{allocation} widths: KL {losses[allocation]:.4f} on text that the model wrote")
    best = min(losses, key=losses.__getitem__)
    for allocation in losses:
        place = out.with_name(f"{out.name}.{allocation}")
        if allocation == best:
            place.rename(out)
        else:
            shutil.rmtree(place)
    return True


def quantize_with_bar(
    source: str,
    out: Path,
    options: QuantizeOptions,
    resume: bool = False,
    threads: int = 0,
    calibration: str = "none",
    device: str = "cpu",
) -> bool:
    """Quantize with a progress bar on stderr.

    Args:
        source: path or hub id.
        out: the directory to make.
        options: what to make.
        resume: go on with an interrupted run.
        threads: 0 is the default number.
        calibration: a text file, "self" or "none"; the options name it too.
        device: as `check_device` accepts it.

    Returns:
        False when there was nothing left to do.
    """
    from septet import loading
    from septet.checkpoint.stream import Hooks, Progress, quantize_checkpoint

    path = loading.resolve_source(source)
    if loading.is_gguf(path):
        quiet_libraries()
    with progress_bar() as bar:
        task = bar.add_task("read", total=None)

        def show(event: Progress) -> None:
            bar.update(task, description=f"{event.stage} {event.name}")
            if event.total_bytes:
                bar.update(task, completed=event.done_bytes, total=event.total_bytes)

        hooks = Hooks(
            plan=loading.plan_checkpoint,
            progress=show,
            convert_gguf=loading.convert_gguf,
            calibrate=calibrate_with(calibration, options, threads, show, device),
            quantizer=quantizer_on(device),
        )
        return quantize_checkpoint(path, out, options, hooks, resume, threads)
