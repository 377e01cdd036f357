"""The Python API as README shows it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from tiny import images, make_recipe, save_weights, tiny_vit

import repshift_cli
from repshift_cli import errors
from repshift_cli.checkpoints.options import LoadOptions


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


def test_a_second_call_replaces_the_first() -> None:
    recipe, model = repshift_cli.Recipe.parse(make_recipe().text), tiny_vit()
    first = repshift_cli.compress(model, recipe)
    second = repshift_cli.compress(model, recipe)
    with pytest.raises(errors.UsageError, match="the plan of this model was detached"):
        first(images())
    third = repshift_cli.compress(second, recipe)
    with torch.no_grad():
        assert torch.equal(third(images()), third.trace(images()).output)
        assert repshift_cli.detach(model) is model
        assert torch.equal(model(images()), tiny_vit()(images()))
    with pytest.raises(errors.ModelError, match="no plan"):
        repshift_cli.detach(model)
    first.detach()


def test_options_are_for_checkpoints() -> None:
    with pytest.raises(errors.UsageError, match="the model is a module"):
        repshift_cli.compress(tiny_vit(), make_recipe(), options=LoadOptions())


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


class TestSave:
    @pytest.mark.slow
    def test_a_fine_tuned_model_of_timm_is_saved_and_loaded(self, tmp_path: Path) -> None:
        cut = timm.create_model("vit_tiny_patch16_224", num_classes=5, depth=4).eval()
        model = repshift_cli.compress(timm.create_model("deit_tiny_patch16_224", num_classes=5).eval(), make_recipe())
        with torch.no_grad():
            next(model.parameters()).add_(0.1)
        path = model.save(tmp_path / "tuned.safetensors")
        again = repshift_cli.load(path)
        x = torch.randn(2, 3, 224, 224)
        with torch.no_grad():
            assert torch.equal(again(x), model(x))
        assert again.plan == model.plan
        with pytest.raises(errors.UsageError, match="exists"):
            model.save(path)
        changed = repshift_cli.compress(cut, make_recipe())
        with pytest.raises(errors.ModelError, match="does not compute the same"):
            changed.save(tmp_path / "changed.safetensors")

    @pytest.mark.parametrize("reducer", ["prune", "merge"])
    def test_a_loaded_model_is_saved_again(self, reducer: str, tmp_path: Path) -> None:
        recipe = repshift_cli.Recipe.parse(make_recipe().text.replace("prune", reducer))
        model = repshift_cli.compress("builtin:vit-digits-small", recipe)
        first = repshift_cli.load(model.save(tmp_path / "a.safetensors"))
        second = repshift_cli.load(first.save(tmp_path / "b.safetensors"))
        x = torch.randn(2, *model.preprocessing.shape)
        assert torch.equal(second(x), model(x))

    def test_a_model_that_changed_is_refused(self, tmp_path: Path) -> None:
        dense = timm.create_model("deit_tiny_patch16_224", num_classes=5).eval()
        dense.blocks[0].attn.scale = 1.0
        with pytest.raises(errors.ModelError, match="does not compute the same") as caught:
            repshift_cli.compress(dense, make_recipe()).save(tmp_path / "x.safetensors")
        assert "--model-args" in str(caught.value)
        assert not list(tmp_path.iterdir())


def test_the_text_of_a_model_shows_its_plan() -> None:
    model = repshift_cli.compress(tiny_vit(), make_recipe())
    lines = repr(model).splitlines()
    assert lines[0].startswith("CompressedModel(VisionTransformer, ")
    assert len(lines) == 3 + len(model.plan.sites)
    assert lines[-2] == "  last block: prefix tokens only"
    assert f"blocks.{model.plan.sites[0].layer}: 17 -> " in lines[1]
    model.detach()
    assert repr(model) == "CompressedModel(VisionTransformer, detached)"


def test_features_and_classes() -> None:
    model = repshift_cli.compress(tiny_vit(), make_recipe())
    assert model.num_classes == tiny_vit().num_classes
    assert model.forward_features(images()).shape[1] == model.plan.sites[-1].tokens_out


@pytest.mark.slow
def test_search_finds_a_recipe() -> None:
    name = "builtin:vit-digits-small"
    recipe = repshift_cli.search_recipe(name, "macs=0.8", "builtin:digits", images=32, evaluations=2)
    model = repshift_cli.compress(name, recipe)
    assert 0.7 < model.macs() / model.dense_macs() <= 0.8
