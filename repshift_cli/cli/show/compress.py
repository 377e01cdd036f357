"""Print the result of `repshift compress`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from repshift_cli.cli.show.plan import show_sites

if TYPE_CHECKING:
    from repshift_cli.calibration.calibrate import Calibration
    from repshift_cli.compression.measured import CompressReport, Measured


__all__ = [
    "show_compression",
]


def show_compression(report: CompressReport) -> None:
    """Print the report for people, in 80 columns."""
    from repshift_cli.cli import ui

    plan, unit = report.plan, report.loaded.description.preprocessing.unit
    params = sum(parameter.numel() for parameter in report.loaded.model.parameters())
    ui.print_text(
        f"model   {report.loaded.description.name} ({report.family}), {params:,} parameters, kept as they are"
    )
    ui.print_text(f"recipe  {report.recipe.place.name}")
    ui.print_text(f"reducer {plan.reducer.kind}")
    ui.print_text("")
    if report.calibration:
        _show_calibration(report.calibration, unit)
    if report.found:
        from repshift_cli.cli.show.search import show_found

        show_found(report.found)
    show_sites(plan, "Plan: tokens through each site")
    if report.measured:
        _show_measured(report.measured, unit)
    else:
        ratio = report.dense_macs / report.macs
        ui.print_text(f"{report.dense_macs / 1e9:.2f} -> {report.macs / 1e9:.2f} GMACs per {unit} ({ratio:.2f}x less)")
        ui.print_text("Dry run: nothing was run, measured or written.")
    if report.output:
        size = report.output.stat().st_size / 1e6
        ui.print_text(f"wrote   {report.output} ({size:.1f} MB; tokens go, weights stay, so the size is the same)")


def _show_measured(measured: Measured, unit: str) -> None:
    from repshift_cli.cli import ui

    before, after = measured.dense, measured.compressed
    rows = [
        [
            f"GMACs per {unit}",
            f"{before.macs / 1e9:.3f}",
            f"{after.macs / 1e9:.3f}",
            f"{before.macs / after.macs:.2f}x",
        ],
        [
            "latency, median ms",
            _milliseconds(before.latency.median),
            _milliseconds(after.latency.median),
            f"{measured.speedup.ratio:.2f}x",
        ],
        [
            "  p10 - p90",
            f"{_milliseconds(before.latency.p10)} - {_milliseconds(before.latency.p90)}",
            f"{_milliseconds(after.latency.p10)} - {_milliseconds(after.latency.p90)}",
            "",
        ],
        [
            f"{unit}s per second",
            f"{before.throughput:.1f}",
            f"{after.throughput:.1f}",
            f"{after.throughput / before.throughput:.2f}x",
        ],
        [
            "peak memory, MB",
            f"{before.peak_bytes / 1e6:.0f}",
            f"{after.peak_bytes / 1e6:.0f}",
            f"{before.peak_bytes / after.peak_bytes:.2f}x",
        ],
    ]
    attention = "" if measured.attention == "none" else f", {measured.attention}"
    title = f"Measured: batch {measured.batch_size}, {measured.dtype}, {measured.threads} threads{attention}"
    ui.print_table(title, ["", "dense", "compressed", "ratio"], rows)
    ui.print_text(f"speed   {measured.speedup}")
    if measured.agreement is not None and unit == "clip":
        told = (
            f"{measured.agreement:.1%} are still most like themselves among all "
            f"(mean KL of that {measured.divergence:.4f} nats)"
        )
    elif measured.agreement is not None:
        told = f"{measured.agreement:.1%} of predictions unchanged (mean KL {measured.divergence:.4f} nats)"
    else:
        told = f"features differ by {measured.divergence:.4f} (one minus cosine; the model has no head)"
    ui.print_text(f"quality {told} on {measured.images.description}")


def _show_calibration(calibration: Calibration, unit: str) -> None:
    from repshift_cli.cli import ui

    rows = [["chosen, site by site", *_cells(calibration.result.numbers())]]
    rows.append(["without calibration", *_cells(calibration.default.numbers())])
    rows.append(["dropped at random", *_cells(calibration.random.numbers())])
    tried = sum(len(choice.candidates) for choice in calibration.sites)
    title = f"Calibration: {tried} candidates on {calibration.images} unlabelled {unit}s, {calibration.seconds:.0f} s"
    ui.print_table(title, ["on the half that took no part in choosing", f"{unit}s", "change", "unchanged"], rows)
    verdict = "NOT clearly better than random"
    if calibration.clear:
        verdict = "clearly better than random"
    elif calibration.mild:
        verdict = "so little goes that random hardly harms either"
    ui.print_text(f"        {verdict} ({calibration.sigmas:.1f} standard errors)")
    ui.print_text("")


def _cells(result: dict[str, object]) -> list[str]:
    agreement = result["agreement"]
    same = f"{agreement:.1%}" if isinstance(agreement, float) else "-"
    far = result["distance"]
    return [str(result["images"]), f"{far:.4f}" if isinstance(far, float) else "-", same]


def _milliseconds(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"  # noqa: PLR2004 (a second)
