"""Print the report of `repshift compress`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from repshift_cli.cli import ui
from repshift_cli.cli.show.plan import show_sites
from repshift_cli.utils.files import size_of

if TYPE_CHECKING:
    from repshift_cli.calibration.calibrate import Calibration
    from repshift_cli.calibration.recover import Recovery
    from repshift_cli.compression.measured import CompressReport, Measured


def show_compression(report: CompressReport) -> None:
    """Print the report in 80 columns."""
    plan, unit = report.plan, report.loaded.description.preprocessing.unit
    params = sum(parameter.numel() for parameter in report.loaded.model.parameters())
    changed = report.recovery if report.recovery and report.recovery.kept else None
    state = f"{len(changed.tensors)} tensors changed" if changed else "unchanged"
    ui.print_text(f"model   {report.loaded.description.name} ({report.family}), {params:,} parameters, {state}")
    ui.print_text(f"recipe  {report.recipe.place.name}")
    ui.print_text(f"reducer {plan.reducer.kind}")
    ui.print_text("")
    if report.calibration:
        _show_calibration(report.calibration, unit)
    if report.recovery:
        _show_recovery(report.recovery, unit)
    if report.found:
        from repshift_cli.cli.show.search import show_found

        show_found(report.found)
    show_sites(plan, "Plan: tokens at each site")
    if report.measured:
        _show_measured(report.measured, unit)
        if report.measured.images.builtin and not report.loaded.is_builtin:
            ui.print_text(f"quality not measured: give {unit}s of the model's own kind with --data")
        else:
            ui.print_text(f"quality {_quality(report.measured, unit)} on {report.measured.images.description}")
    else:
        ratio = report.dense_macs / report.macs
        ui.print_text(f"{report.dense_macs / 1e9:.2f} -> {report.macs / 1e9:.2f} GMACs per {unit} ({ratio:.2f}x less)")
        ui.print_text("Dry run: nothing was run, measured or written.")
    if report.output:
        size = size_of(report.output) / 1e6
        weights = f"dense weights and {state}" if changed else "weights are unchanged, so is the size"
        ui.print_text(f"wrote   {report.output} ({size:.1f} MB; {weights})")


def _show_measured(measured: Measured, unit: str) -> None:
    before, after = measured.dense, measured.compressed
    milliseconds = [
        [_milliseconds(each) for each in (side.latency.median, side.latency.p10, side.latency.p90)]
        for side in (before, after)
    ]

    def row(name: str, digits: int, dense: float, compressed: float, ratio: float) -> list[str]:
        return [name, f"{dense:.{digits}f}", f"{compressed:.{digits}f}", f"{ratio:.2f}x"]

    rows = [
        row(f"GMACs per {unit}", 3, before.macs / 1e9, after.macs / 1e9, before.macs / after.macs),
        ["latency, median ms", *(median for median, _, _ in milliseconds), f"{measured.speedup.ratio:.2f}x"],
        ["  p10 - p90", *(f"{p10} - {p90}" for _, p10, p90 in milliseconds), ""],
        row(f"{unit}s per second", 1, before.throughput, after.throughput, after.throughput / before.throughput),
        row(
            "peak memory, MB", 0, before.peak_bytes / 1e6, after.peak_bytes / 1e6, before.peak_bytes / after.peak_bytes
        ),
    ]
    attention = "" if measured.attention == "none" else f", {measured.attention}"
    title = f"Measured: batch {measured.batch_size}, {measured.dtype}, {measured.threads} threads{attention}"
    ui.print_table(title, ["", "dense", "compressed", "ratio"], rows)
    ui.print_text(f"speed   {measured.speedup}")


def _quality(measured: Measured, unit: str) -> str:
    if measured.agreement is None:
        return f"features differ by {measured.divergence:.4f} (1 - cosine; the model has no head)"
    if unit == "clip":
        return (
            f"{measured.agreement:.1%} of clips still closest to their dense embedding "
            f"(mean KL {measured.divergence:.4f} nats)"
        )
    return f"{measured.agreement:.1%} of predictions unchanged (mean KL {measured.divergence:.4f} nats)"


def _show_calibration(calibration: Calibration, unit: str) -> None:
    outcomes = {
        "chosen per site": calibration.result,
        "the paper's choice": calibration.default,
        "random dropping": calibration.random,
    }
    rows = [[name, *_cells(outcome.numbers())] for name, outcome in outcomes.items()]
    tried = sum(len(choice.candidates) for choice in calibration.sites)
    title = f"Calibration: {tried} candidates on {calibration.images} unlabelled {unit}s, {calibration.seconds:.0f} s"
    ui.print_table(title, [f"on the held-out {unit}s", f"{unit}s", "prediction distance", "unchanged"], rows)
    verdict = f"{'NOT clearly better' if calibration.sigmas >= 0 else 'WORSE'} than random dropping"
    if calibration.clear:
        verdict = "clearly better than random dropping"
    elif calibration.mild:
        verdict = "so few tokens are dropped that random dropping is hardly worse"
    elif calibration.accepted:
        verdict = "not clearly better than random dropping, and not worse"
    ui.print_text(f"        {verdict} ({calibration.sigmas:.1f} standard errors)")
    ui.print_text("")


def _show_recovery(recovery: Recovery, unit: str) -> None:
    rows = [[name, *_cells(getattr(recovery, name).numbers())] for name in ("before", "after")]
    title = f"Recovery: {recovery.passes} passes, {recovery.images} unlabelled {unit}s, {recovery.seconds:.0f} s"
    ui.print_table(title, [f"on the held-out {unit}s", f"{unit}s", "prediction distance", "unchanged"], rows)
    kept = f"kept, {len(recovery.tensors)} norms, biases and last-layer tensors" if recovery.kept else "NOT kept"
    ui.print_text(f"        {kept} ({recovery.sigmas:.1f} standard errors)")
    ui.print_text("")


def _cells(result: dict[str, object]) -> list[str]:
    agreement, distance = result["agreement"], result["distance"]
    return [
        str(result["images"]),
        f"{distance:.4f}" if isinstance(distance, float) else "-",
        f"{agreement:.1%}" if isinstance(agreement, float) else "-",
    ]


def _milliseconds(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"  # noqa: PLR2004 (a second)
