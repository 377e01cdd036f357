"""`repshift dense`: write the dense checkpoint back that a compressed one was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from repshift_cli.cli import options, ui


def command(
    checkpoint: Annotated[str, typer.Argument(metavar="FILE", help="A compressed checkpoint, a file or a folder.")],
    *,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="PATH", help="Output file or folder. [default: (<checkpoint>_dense.safetensors)]"
        ),
    ] = None,
    force: options.Overwrite = False,
    json: options.AsJson = False,
) -> None:
    """Write the dense checkpoint back, without the plan.

    It has the same tensors, keys and dtypes.
    """
    from repshift_cli.checkpoints.artifact import check_save, save_dense
    from repshift_cli.checkpoints.load import load_checkpoint
    from repshift_cli.utils.files import size_of

    given = Path(checkpoint)
    output = output or given.with_name(f"{given.stem}_dense{given.suffix}")
    check_save(output, force)
    loaded = load_checkpoint(checkpoint)
    save_dense(output, loaded, force)
    size = size_of(output)
    if json:
        ui.result.keep({"output": str(output), "bytes": size, "tensors": len(loaded.tensors)})
    else:
        ui.print_text(f"wrote   {output} ({size / 1e6:.1f} MB, {len(loaded.tensors)} tensors, no plan)")
