"""A run that begins from another: what is carried over, and in which place."""

import json
from dataclasses import replace

import torch

from smaug import checkpoint
from smaug import recipe as recipes
from smaug.objectives.answer import Answer
from smaug.optim import adamw
from smaug.run import build, start_from


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
