"""A run that is read back; one that begins from another: what is carried over, and in which place."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from smaug import checkpoint
from smaug import recipe as recipes
from smaug.evaluate import __main__ as evaluate
from smaug.objectives.answer import Answer
from smaug.optim import adamw
from smaug.run import build, load_run, start_from
from smaug.testing import save_random_run


def made(tmp_path, answer, max_words=32, save=True):
    """A small model for questions, and its recipe; its run in the folder."""
    recipe = recipes.load("qa")
    video = replace(recipe.model.video, width=32, depth=1, heads=2)
    text = replace(recipe.model.text, width=32, depth=1, heads=2, max_words=max_words)
    fusion = replace(recipe.model.fusion, heads=2)
    model = replace(recipe.model, video=video, text=text, fusion=fusion)
    recipe = replace(recipe, model=model, objectives={"answer": replace(answer, decoder=fusion)})
    built = build(recipe, 50, "reference")
    if save:
        checkpoint.save(tmp_path / "checkpoints", 1, built, adamw(built, recipe.optim), {})
        config = {"recipe": recipes.to_json(recipe), "fast": False, "size": "tiny"}
        (tmp_path / "config.json").write_text(json.dumps(config))
    return built, recipe


def test_classes_keep_the_weights_of_their_answers(tmp_path):
    old, _ = made(tmp_path, Answer(answers=("yes", "no", "red")))
    new, recipe = made(tmp_path, Answer(answers=("red", "two", "yes")), save=False)
    two = new.heads["answer"].scores.weight[1].clone()
    assert "2 of 3 answers are its own" in start_from(new, recipe, tmp_path)
    before, after = old.heads["answer"].scores, new.heads["answer"].scores
    assert after.weight[[0, 2]].equal(before.weight[[2, 0]]) and after.bias[[0, 2]].equal(before.bias[[2, 0]])
    assert after.weight[1].equal(two)


def test_a_decoder_begins_from_the_fusion_encoder_also_after_a_classifier_and_for_longer_texts(tmp_path):
    old, _ = made(tmp_path, Answer(answers=("yes", "no")))
    new, recipe = made(tmp_path, Answer(answers=("yes", "no"), by="decoder"), max_words=40, save=False)
    assert "new in heads.answer;" in start_from(new, recipe, tmp_path)  # its matrix of words
    speller = new.heads["answer"]
    for name, value in old.fusion.state_dict().items():
        assert speller.layers.state_dict()[name].equal(value)
    assert speller.position[:32].equal(old.text.position) and speller.position[32].equal(old.text.position[1])
    assert torch.equal(speller.word.weight, old.text.word.weight)


def test_which_checkpoint_is_read_and_what_is_said(tmp_path, capsys, monkeypatch):
    _, recipe = made(tmp_path / "small", Answer(answers=("yes", "no")), save=False)
    folder = tmp_path / "run"
    save_random_run(folder, recipe, ["a red square", "two of them"])
    first = load_run(folder, "cpu").model
    optimizer = adamw(first, recipe.optim)
    half = {name: p.detach() * 0.5 for name, p in first.named_parameters()}
    for step, score, ema in ((1, 0.9, None), (2, 0.1, half), (3, 0.2, None)):
        checkpoint.save(folder / "checkpoints", step, first, optimizer, {}, ema=ema, score=score, keep=3)
    assert [load_run(folder, "cpu", which).step for which in ("newest", "best", 2)] == [3, 1, 2]
    averaged = load_run(folder, "cpu", 2).model
    assert all(torch.equal(p, half[name]) for name, p in averaged.named_parameters())
    assert capsys.readouterr() == ("", "")

    path = folder / "checkpoints/step-3/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    run = load_run(folder, "cpu")
    said = f"smaug: {path.parent} is damaged (checksum of model.safetensors) and was passed over\n"
    assert run.step == 2 and capsys.readouterr() == ("", said)
    begun, _ = made(tmp_path / "small", Answer(answers=("yes", "no")), save=False)
    assert "step 2" in start_from(begun, recipe, folder) and capsys.readouterr() == ("", said)
    for which, match in (
        (3, r"step-3 is damaged .* no checkpoint of step 3 that is whole; its steps are: 1, 2, 3$"),
        (7, r"^\S* has no checkpoint of step 7 that is whole; its steps are: 1, 2, 3$"),
    ):
        with pytest.raises(ValueError, match=match):
            load_run(folder, "cpu", which)
    save_random_run(tmp_path / "unscored", recipe, ["a red square"])
    with pytest.raises(ValueError, match=r"no checkpoint with a score, which --eval-every gives; its steps are: 0$"):
        load_run(tmp_path / "unscored", "cpu", "best")

    asked = []

    def loaded(folder, device, which):
        asked.append(which)
        raise ValueError("enough")

    monkeypatch.setattr(evaluate, "load_run", loaded)
    for words, which in (([], "newest"), (["--step", "best"], "best"), (["--step", "12"], 12)):
        monkeypatch.setattr(sys, "argv", ["evaluate", str(folder), *words])
        assert evaluate.main() == 1 and asked.pop() == which
