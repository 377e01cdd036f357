"""The Python API as README shows it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import images, make_recipe, save_weights, tiny_vit

import repshift_cli
from repshift_cli import errors


def run_python(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_it_imports_no_heavy_library() -> None:
    heavy = "torch timm numpy matplotlib safetensors rich typer pydantic"
    program = f"import sys, repshift_cli; print(sorted(set('{heavy}'.split()) & set(sys.modules)))"
    assert run_python(program) == "[]\n"


def test_the_command_line_imports_torch_only_when_it_is_needed() -> None:
    program = (
        "import sys\n"
        "sys.argv = ['repshift', '--help']\n"
        "from repshift_cli.cli import main\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    print(sorted({'torch', 'timm', 'numpy', 'matplotlib'} & set(sys.modules)))\n"
    )
    assert run_python(program).endswith("[]\n")


def test_every_public_name_exists() -> None:
    for name in repshift_cli.__all__:
        assert getattr(repshift_cli, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'decompress'"):
        _ = repshift_cli.decompress


def test_the_package_has_no_module_that_hides_a_function() -> None:
    import repshift_cli.compression
    import repshift_cli.planning.recipe

    assert callable(repshift_cli.compress)
    assert callable(repshift_cli.load)
    assert isinstance(repshift_cli.Recipe, type)


def test_compress_inspect_save_and_load(tmp_path: Path) -> None:
    from repshift_cli.checkpoints.options import LoadOptions
    from repshift_cli.compression.run import compress_checkpoint
    from repshift_cli.compression.settings import Settings
    from repshift_cli.utils.progress import Silent

    recipe = repshift_cli.Recipe.parse(make_recipe().text)
    model = repshift_cli.compress(tiny_vit(embed_dim=64), recipe)
    assert isinstance(model, repshift_cli.CompressedModel)
    trace = model.trace(images())
    assert isinstance(trace, repshift_cli.Trace)
    assert [index.shape[1] for index in trace.kept.values()] == [12, 5]
    with torch.no_grad(), model.dense() as dense:
        assert torch.equal(dense(images()), tiny_vit(embed_dim=64)(images()))

    (tmp_path / "r.yaml").write_text(recipe.text)
    path = save_weights(tiny_vit(embed_dim=64), tmp_path / "dense.safetensors")
    settings = Settings(
        recipe=str(tmp_path / "r.yaml"), load=LoadOptions(heads=2), output=tmp_path / "small.safetensors", seconds=0.0
    )
    compress_checkpoint(str(path), settings, Silent())
    again = repshift_cli.load(tmp_path / "small.safetensors")
    assert torch.equal(again.trace(images()).output, trace.output)
    assert again.preprocessing.input_size == (3, 32, 32)


OPEN = "version: 1\nmetric: {kind: METRIC}\nlayers: [{layer: 1, drop_ratio: 0.5}]\n"


def test_open_fields_without_images_are_said() -> None:
    recipe = repshift_cli.Recipe.parse(OPEN.replace("METRIC", "representation_shift"))
    with pytest.warns(UserWarning, match="NOT CALIBRATED: there are no images"):
        repshift_cli.compress(tiny_vit(), recipe)
    with pytest.raises(errors.UsageError, match="fitted on images"):
        repshift_cli.compress(tiny_vit(), repshift_cli.Recipe.parse(OPEN.replace("METRIC", "fitted")))


def test_a_model_in_memory_can_be_compressed_again() -> None:
    recipe, model = repshift_cli.Recipe.parse(make_recipe().text), tiny_vit()
    first = repshift_cli.compress(model, recipe)
    for again in (model, first):
        with pytest.raises(errors.ModelError, match="compressed already") as caught:
            repshift_cli.compress(again, recipe)
        assert "repshift_cli.detach(model)" in str(caught.value)
    assert repshift_cli.detach(model) is model
    with pytest.raises(errors.ModelError, match="no plan"):
        repshift_cli.detach(model)
    second = repshift_cli.compress(model, recipe)
    with pytest.raises(errors.UsageError, match="the plan of this model was detached"):
        first(images())
    first.detach()
    with torch.no_grad():
        assert torch.equal(second(images()), second.trace(images()).output)
        assert torch.equal(second.detach()(images()), tiny_vit()(images()))


def test_errors_have_one_base() -> None:
    with pytest.raises(repshift_cli.RepshiftError) as caught:
        repshift_cli.Recipe.load("no_such_recipe")
    assert caught.value.exit_code == 2
    with pytest.raises(repshift_cli.RepshiftError):
        repshift_cli.load("missing.safetensors")


KINDS = [name for name, value in vars(errors).items() if isinstance(value, type)]


@pytest.mark.parametrize("name", sorted(set(KINDS) - {"RepshiftError"}))
def test_each_kind_of_error_has_its_exit_code(name: str) -> None:
    kind = getattr(errors, name)
    codes = {"UsageError": 2, "RecipeError": 2, "ModelError": 3, "CheckpointError": 3, "DataError": 4, "CheckFailed": 5}
    assert kind.exit_code == codes.get(name, 1)
    assert str(kind("what is wrong", "what to do")) == "what is wrong\nwhat to do"
