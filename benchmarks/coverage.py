"""Which architectures are accepted, and whether those that are accepted are computed correctly.

    python benchmarks/coverage.py [--only PATTERN] [--state FILE] [--dry-run]

All architectures of timm, the image towers of open_clip, the classifiers of torchvision and a list of classes of
transformers are built with random weights, with two blocks per stage and small images where their arguments allow it.
Whether one is accepted is asked of timm's full model. Each accepted one is run:

- a sequence of tokens: the permute test after each block, on 3 images (repshift_cli/reduction/permute.py);
- a map: the shift test after the first and the middle block (repshift_cli/reduction/shift.py; models of up to 150
  million parameters); a plan that keeps all rows and columns must change no bit;
- both: a plan that drops tokens after the first site; the number of kept tokens, the multiply-accumulates against those
  that torch counts, and finite outputs.

One that fails a check is wrong. The weights are drawn so that no layer scale and no zero hides a difference. A process
with a limit of memory runs a few architectures; if it is stopped, the next process goes on behind the one that ran.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import resource
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _results import publish, table
from torch import Tensor

from repshift_cli.checkpoints.create import quickly_on_meta
from repshift_cli.errors import RepshiftError, first_line
from repshift_cli.measure.device import device_name
from repshift_cli.measure.macs import count_macs
from repshift_cli.planning.recipe import Recipe
from repshift_cli.reduction.compressed_model import attach, detach
from repshift_cli.reduction.families.base import Family, find, match
from repshift_cli.reduction.families.maps import MapFamily
from repshift_cli.reduction.permute import TOLERANCE, permute_difference
from repshift_cli.reduction.plans import resolve_for
from repshift_cli.reduction.shift import shift_difference

CHUNK = 40
MEMORY = 10 * 2**30
DRAWN = 1_000_003
"""Different weights, which repeat in larger models; a prime, so that rows differ."""

LARGEST = 1_000_000_000
"""Parameters of the full model, where it cannot be cut."""

SHIFTED = 150_000_000
"""Parameters of a model whose copy in float64 is run."""

SECONDS = 120
"""For one architecture."""

TRANSFORMERS = (
    *("ViTModel", "ViTForImageClassification", "ViTMSNModel", "DeiTModel", "DeiTForImageClassification", "Dinov2Model"),
    *("Dinov2ForImageClassification", "Dinov2WithRegistersModel", "DINOv3ViTModel", "BeitModel", "Data2VecVisionModel"),
    *("BeitForImageClassification", "CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPForImageClassification"),
    *("SiglipVisionModel", "SiglipForImageClassification", "Siglip2VisionModel", "IJepaModel", "PixtralVisionModel"),
    *("IJepaForImageClassification", "VideoMAEModel", "VideoMAEForVideoClassification", "VivitModel", "ASTModel"),
    *("TimesformerModel", "VJEPA2Model", "ViTMAEModel", "BlipVisionModel", "InternVLVisionModel", "YolosModel"),
    *("SwinModel", "Swinv2Model", "PvtV2Model", "LevitModel", "ResNetModel", "ResNetForImageClassification"),
    *("ConvNextForImageClassification", "ConvNextV2ForImageClassification"),
    *("ConvNextModel", "ConvNextV2Model", "RegNetModel", "SegformerModel", "HieraModel", "MobileViTModel"),
)
"""Image and video encoders of transformers."""

_SMALL = {
    **{"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "image_size": 32},
    **{"patch_size": 8, "depths": [2, 2, 2, 2], "hidden_sizes": [8, 8, 16, 16], "embedding_size": 8, "num_frames": 4},
}


@dataclass(frozen=True)
class Found:
    """One architecture: `state` is accepted, refused, wrong or not checked."""

    module: str
    name: str
    state: str
    reason: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PATTERN", default="*", help="names to check, such as 'timm/vit_*'")
    parser.add_argument("--dry-run", action="store_true", help="write no page")
    parser.add_argument("--state", type=Path, help="keep results in this file, and go on with those that it has")
    parser.add_argument("--worker", nargs="+", metavar="NAME", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.worker:
        _work(args.worker)
        return
    found = _read(args.state)
    done = {each.name for each in found}
    names = [name for name in all_names() if fnmatch.fnmatch(name, args.only) and name not in done]
    started = time.monotonic()
    for result in _in_processes(names):
        found.append(result)
        if args.state:
            with args.state.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(result)) + "\n")
        if result.state in ("wrong", "not checked"):
            print(f"{result.name}: {result.state}: {result.reason}", flush=True)
        if len(found) % 25 == 0:
            counts = Counter(each.state for each in found)
            print(
                f"{len(found)} of {len(done) + len(names)} in {time.monotonic() - started:.0f} s: {dict(counts)}",
                flush=True,
            )
    found = [each for each in found if fnmatch.fnmatch(each.name, args.only)]
    publish(
        "coverage",
        "Coverage of architectures",
        f"{device_name(torch.device('cpu'))}, float32, 1 thread",
        _page(found),
        dry_run=args.dry_run,
    )


def _read(state: Path | None) -> list[Found]:
    """The results of earlier runs."""
    if state is None or not state.exists():
        return []
    return [Found(**json.loads(line)) for line in state.read_text(encoding="utf-8").splitlines()]


def all_names() -> list[str]:
    """All architectures as `library/name`."""
    import open_clip
    import timm
    from torchvision import models

    timms = [f"timm/{name}" for name in timm.list_models()]
    visions = [f"torchvision/{name}" for name in models.list_models(module=models)]
    clips = [f"open_clip/{name}" for name in open_clip.list_models()]
    return [*timms, *clips, *visions, *(f"transformers/{name}" for name in TRANSFORMERS)]


def _in_processes(names: Sequence[str]) -> Iterator[Found]:
    """Check the names in processes of a few names each."""
    left = list(names)
    while left:
        chunk = left[:CHUNK]
        command = [sys.executable, __file__, "--worker", *chunk]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)  # noqa: S603
        done = 0
        assert process.stdout is not None
        for line in process.stdout:
            yield Found(**json.loads(line))
            done += 1
        if process.wait() and done < len(chunk):
            name = chunk[done]
            yield Found(_module(name), name, "not checked", f"its process ended with {process.returncode}")
            done += 1
        left = left[done:]


def _work(names: Sequence[str]) -> None:
    """Check names and print one result a line; stops at the limits of memory and time."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    _without_initial_weights()
    for name in names:
        used = int(time.process_time())
        resource.setrlimit(resource.RLIMIT_CPU, (used + SECONDS, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        print(json.dumps(asdict(check(name))), flush=True)


def _without_initial_weights() -> None:
    """Leave out the slow part of building models, whose weights are drawn anyway."""
    from timm.layers import weight_init
    from torch.nn import init

    weight_init._trunc_normal_ = lambda tensor, *_: tensor
    init.kaiming_uniform_ = init.kaiming_normal_ = init.uniform_ = lambda tensor, *_, **__: tensor


@torch.no_grad()
def check(name: str) -> Found:
    """Whether an architecture is accepted, and correct."""
    library, _, short = name.partition("/")
    module = _module(name)
    try:
        asked = _BUILD[library](short, False)
    except Exception as error:
        return Found(module, name, "refused", f"it cannot be built here: {first_line(error)}")
    if find(asked) is None:
        return Found(module, name, "refused", f"no family for {type(asked).__name__}")
    try:
        match(asked)
    except RepshiftError as error:
        return Found(module, name, "refused", error.message.partition(": ")[2] or error.message)
    try:
        model = _reduced(library, short, asked)
        problem = _problem(model)
    except MemoryError:
        return Found(module, name, "not checked", "too large")
    except Exception as error:
        return Found(module, name, "wrong", f"{type(error).__name__}: {first_line(error)}")
    return Found(module, name, "wrong" if problem else "accepted", problem)


def _module(name: str) -> str:
    library, _, short = name.partition("/")
    if library != "timm":
        return library
    from timm.models import _registry

    return f"timm {_registry._model_to_module[short]}"


def _timm(name: str, small: bool) -> Any:
    """The full model without weights; `_small_timm` builds the small one."""
    return quickly_on_meta(name, {})


def _open_clip(name: str, small: bool) -> Any:
    """The image tower of a CLIP model."""
    import open_clip
    from open_clip.model import _build_vision_tower

    config = open_clip.get_model_config(name)
    vision = {**config["vision_cfg"], "timm_model_pretrained": False}
    if small and isinstance(vision.get("layers"), int):
        vision |= {"layers": 2, "image_size": 4 * vision["patch_size"]}
    with torch.device("cpu" if small else "meta"):
        tower: Any = _build_vision_tower(config["embed_dim"], vision, config.get("quick_gelu", False)).eval()
    if small and hasattr(getattr(tower, "trunk", None), "blocks"):
        tower.trunk.blocks = tower.trunk.blocks[:2]
    return tower


def _torchvision(name: str, small: bool) -> Any:
    from torchvision import models

    with torch.device("cpu" if small else "meta"):
        model: Any = models.get_model(name, weights=None).eval()
    if small and name.startswith("vit_"):
        model.encoder.layers = model.encoder.layers[:2]
    return model


def _transformers(name: str, small: bool) -> Any:
    import transformers

    kind = getattr(transformers, name)
    defaults = kind.config_class()
    values = {key: value for key, value in _SMALL.items() if hasattr(defaults, key)}
    for key, value in values.items():
        usual = getattr(defaults, key)
        if isinstance(usual, list | tuple) and not isinstance(value, list):
            values[key] = [value] * len(usual)
    if "depths" in values:
        values.pop("num_hidden_layers", None)  # in some classes the number of stages
    config = kind.config_class(**values)
    return kind(config).eval()


_BUILD: dict[str, Callable[[str, bool], Any]] = {
    "timm": _timm,
    "open_clip": _open_clip,
    "torchvision": _torchvision,
    "transformers": _transformers,
}


def _reduced(library: str, name: str, full: Any) -> Any:
    """The model with two blocks, or two per stage, and drawn weights."""
    if library != "timm" and sum(parameter.numel() for parameter in full.parameters()) > LARGEST:
        raise MemoryError
    model = _small_timm(name, full) if library == "timm" else _BUILD[library](name, True)
    pool, start = torch.randn(DRAWN, generator=torch.Generator().manual_seed(0)), 0
    for key, parameter in model.named_parameters():
        if any(part in key for part in ("freqs", "periods")):
            continue
        end = start + parameter.numel()
        drawn = pool.repeat(end // DRAWN + 1)[start:end].view(parameter.shape)
        start = end % DRAWN
        if parameter.ndim > 1 and not any(part in key for part in ("pos_embed", "token", "latent", "position")):
            drawn *= (parameter.numel() / parameter.shape[0]) ** -0.5
        else:
            drawn = 0.2 * drawn + (0.0 if parameter.ndim > 1 or "bias" in key else 0.7)
        parameter.copy_(drawn)
    return model.eval().requires_grad_(False)


def _small_timm(name: str, full: Any) -> Any:
    import timm

    inner = getattr(full, "encoder", full)
    embedding = getattr(inner, "patch_embed", None)
    smallest = 48 if isinstance(find(full), MapFamily) else 24  # the last map must hold a 7x7 kernel
    side = 64 if hasattr(embedding, "backbone") else 4 * getattr(embedding, "patch_size", (smallest,))[0]
    image = {"img_size": side} if embedding is not None else {}
    two = (2,) * len(getattr(full, "stages", range(4)))
    tries: list[dict[str, Any]] = [{"layers": two}, {"depths": two}, {}]
    if sequence := hasattr(inner, "blocks"):
        shared = tuple(getattr(getattr(block, "attn", None), "num_kv_heads", None) for block in inner.blocks[:2])
        tries = [{"depth": 2, **image}, {"depth": 2, **image, "num_kv_heads": shared}, image]
    for arguments in tries:
        with suppress(TypeError, AssertionError):
            model = timm.create_model(name, pretrained=False, **arguments)
            break
    else:
        model = timm.create_model(name, pretrained=False)
    if hasattr(model, "embeds"):
        side = 4 * model.embeds.patch_size[0]
    if hasattr(model, "embeds") or not sequence:
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, side, side)}
    return model


def _problem(model: Any) -> str:
    """What is wrong with a model in a family, or nothing."""
    family = match(model)
    layout = family.layout(model)
    shape = _input_shape(model, family)
    images = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    restore = family.needs_restore(model) is not None
    for site in family.sites(model) if layout.map_size is None else ():
        difference = permute_difference(model, family, images, site, None, restore)
        if not difference < TOLERANCE:
            return f"the permute test after {site.name} differs by {difference:.1e}"
    first = layout.sites[0].name
    if layout.map_size and (problem := _map_problem(model, family, images)):
        return problem
    plan = resolve_for(model, _recipe(first, "drop_ratio: 0.2" if layout.map_size else "drop_ratio: 0.4", restore))
    compressed = attach(model, plan)
    trace = compressed.trace(images)
    site = plan.sites[0]
    if trace.kept[site.layer].shape[1] != site.tokens_out - plan.prefix_tokens or site.tokens_out >= site.tokens_in:
        return "another number of tokens than planned is kept"
    if not _tensor(trace.output).isfinite().all():
        return "the output is not finite"
    for given, planned in ((compressed, compressed.macs(True)), (model, family.macs(model, None))):
        if given is model:
            detach(model)
        if (counted := count_macs(given, shape)) != planned:
            return f"{planned} multiply-accumulates expected, {counted} counted"
    return ""


def _map_problem(model: Any, family: Family, images: Tensor) -> str:
    """How a network of maps fails the shift test or a plan that keeps all, or nothing."""
    layout = family.layout(model)
    grid = dict(layout.grids())[layout.sites[0]]
    plan = resolve_for(model, _recipe(layout.sites[0].name, f"keep_grid: [{grid[0]}, {grid[1]}]"))
    dense, kept = model(images), attach(model, plan)(images)
    detach(model)
    if not torch.equal(_tensor(dense), _tensor(kept)):
        return "a plan that keeps all changes the output"
    sites = family.sites(model)
    if sum(parameter.numel() for parameter in model.parameters()) <= SHIFTED:
        for site in (sites[0], sites[len(sites) // 2]):
            if not (difference := shift_difference(model, site)) < TOLERANCE:
                return f"the shift test after {site.name} differs by {difference:.1e}"
    return ""


def _input_shape(model: Any, family: Family) -> tuple[int, ...]:
    """Of one input: that of the family or of the model, else a small image."""
    if (size := family.layout(model).map_size) is not None:
        return (3, *size)
    with suppress(RepshiftError, AttributeError):
        from repshift_cli.reduction.families.transformer import tower_of

        if (tower := tower_of(model)) is not None:
            return tower.input_size
    return (3, *getattr(model, "trunk", model).patch_embed.img_size)


def _recipe(site: str, drop: str, restore: bool = False) -> Recipe:
    metric = "{kind: representation_shift, operation: block, distance: l2, polarity: largest}"
    ending = "restore: true\n" if restore else ""
    return Recipe.parse(f"version: 1\nmetric: {metric}\nlayers: [{{layer: {site}, {drop}}}]\n{ending}")


def _tensor(output: Any) -> Tensor:
    """The first tensor of a result."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, dict) else output
    return next(_tensor(value) for value in values if value is not None)


def _page(found: Sequence[Found]) -> list[str]:
    counts = Counter(each.state for each in found)
    body = []
    for library in _BUILD:
        part = [each for each in found if each.name.startswith(f"{library}/")]
        if part:
            states = Counter(each.state for each in part)
            body.append(f"**{library}**: {_summary(states, len(part))}")
    body.append(f"All: {_summary(counts, len(found))}. How they are checked: `benchmarks/coverage.py`.")
    by_module: dict[str, list[Found]] = defaultdict(list)
    for each in found:
        by_module[each.module].append(each)
    rows = []
    for module, members in sorted(by_module.items()):
        states = Counter(each.state for each in members)
        reasons = Counter(each.reason for each in members if each.state != "accepted")
        text = "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common())
        rows.append(
            [module, *(str(n) for n in (len(members), states["accepted"], states["wrong"])), text.replace("|", "/")]
        )
    body.append(table(["module", "architectures", "accepted", "wrong", "not accepted, with the reason"], rows))
    return body


def _summary(states: Counter[str], total: int) -> str:
    left = f", {states['not checked']} not checked" if states["not checked"] else ""
    share = 100 * states["accepted"] / max(total, 1)
    return f"accepted {states['accepted']} of {total} ({share:.1f}%), wrong {states['wrong']}{left}"


if __name__ == "__main__":
    main()
