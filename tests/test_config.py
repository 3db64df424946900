"""Config: the presets, the checks, and the way to JSON and back."""

import dataclasses
import json
import re

import pytest

from tinygpt import Config, TinyGPTError
from tinygpt.config import PRESETS, from_json, run_command, to_json

WRONG = [  # setting, value, what the sentence must also say
    ("vocab_size", 0, "at least 1"), ("embed_dim", -384, "at least 1"), ("num_heads", 0, "at least 1"),
    ("num_layers", 0, "at least 1"), ("ff_hidden", 0, "at least 1"), ("batch_size", 0, "at least 1"),
    ("eval_interval", 0, "at least 1"), ("epochs", 0, "above 0"), ("epochs", float("nan"), "above 0"),
    ("lr", 0.0, "above 0"), ("lr", float("nan"), "above 0"), ("lr", float("inf"), "above 0"),
    ("grad_clip", -1.0, "above 0"), ("seq_len", 15, "at least 16"), ("dropout", 1.0, "below 1"),
    ("dropout", -0.1, "from 0"), ("warmup_ratio", 1.5, "from 0 to 1"), ("weight_decay", -0.01, "0 or more"),
    ("patience", -1, "0 or more"), ("eval_rows", -1, "0 or more"), ("seed", -1, "0 "), ("seed", 2**64, "0 "),
    ("num_heads", 5, "380 or 385"), ("head", "softmax", "adaptive, tied"), ("optimizer", "sgd", "adamw, muon"),
    ("schedule", "step", "cosine, linear, constant"), ("precision", "int8", "auto, fp32, bf16, fp16"),
    ("embed_dim", "384", "whole number"), ("num_layers", 2.5, "whole number"), ("num_layers", True, "whole number"),
    ("lr", "fast", "a number"), ("shard", 1, "true or false"), ("head", None, "text"),
    ("replies_only", "prosocial", "list of texts"), ("replies_only", (1,), "list of texts"), ("device", 0, "text"),
    ("ema_decay", 1.0, "below 1"), ("accumulation", 0, "at least 1"), ("accumulation", 33, "at most 32"),
    ("compile", "maybe", "auto, yes, no"), ("shard", 1, "true or false")]


def problems(**settings):
    with pytest.raises(TinyGPTError) as caught:
        Config(**settings)
    heading, *lines = str(caught.value).splitlines()
    assert heading.endswith(":")
    return [line.strip() for line in lines]


@pytest.mark.parametrize("name, value, remedy", WRONG)
def test_a_wrong_setting_is_named_with_its_value_and_a_remedy(name, value, remedy):
    (line,) = problems(**{name: value})
    assert name in line and (repr(value) in line or str(value) in line) and remedy in line
    assert re.search(r"; (give|take|choose)", line) and line.endswith(".")


def test_all_problems_are_reported_at_once():
    lines = problems(vocab_size=0, seq_len=3, dropout=7.0, lr=-1.0, num_heads=5, head="none", patience=-2)
    assert {line.split()[0] for line in lines} == {"vocab_size", "seq_len", "dropout", "lr", "embed_dim", "head",
                                                   "patience"}
    assert len(lines) == 7


def test_the_suggested_embed_dims_work():
    for embed_dim in map(int, re.findall(r"\d+", problems(num_heads=5)[0].split("take")[1])):
        assert Config(num_heads=5, embed_dim=embed_dim).embed_dim == embed_dim
    assert Config(embed_dim=18).num_heads == 6
    assert "take embed_dim 18 or" in problems(embed_dim=4, head="tied")[0]  # never a suggestion of 0


def test_the_edges_of_the_ranges_are_allowed():
    edge = Config(dropout=0, warmup_ratio=1, weight_decay=0, eval_rows=0, patience=0, seq_len=16, seed=2**63 - 1, lr=1)
    assert edge.seed == 2**63 - 1


def test_the_reference_is_the_described_model():
    assert set(PRESETS) == {"reference", "chat", "nano"}
    described = {"vocab_size": 32_000, "seq_len": 128, "embed_dim": 384, "num_heads": 6, "num_layers": 8,
                 "ff_hidden": 1536, "dropout": 0.05, "batch_size": 32, "epochs": 10, "lr": 1e-4, "schedule": "cosine",
                 "grad_clip": 1.0, "optimizer": "adamw", "head": "adaptive"}
    reference = to_json(PRESETS["reference"])
    assert {name: reference[name] for name in described} == described
    assert reference["weight_decay"] > 0 and reference["warmup_ratio"] > 0 and reference["patience"] > 0
    assert PRESETS["reference"] == Config()


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().lr = 1.0
    with pytest.raises(TinyGPTError, match="seq_len"):  # a changed copy is checked too
        dataclasses.replace(Config(), seq_len=1)


@pytest.mark.parametrize("config", [*PRESETS.values(), Config(replies_only=(), lr=1, epochs=2.5)])
def test_json_and_back(config):
    assert from_json(json.loads(json.dumps(to_json(config))), "config.json") == config


def test_settings_left_out_of_the_json_take_their_defaults():
    assert from_json({"num_layers": 2}, "config.json") == Config(num_layers=2)


@pytest.mark.parametrize("values, said", [
    ({"n_layer": 8, "num_layers": 8}, "n_layer"), ({"num_layers": "8"}, "num_layers is '8'"),
    ({"num_layers": 8.0}, "num_layers is 8.0"), ({"lr": None}, "lr is None"), ({"dropout": False}, "dropout is False"),
    ({"shard": "no"}, "shard is 'no'"), ({"replies_only": "all"}, "replies_only is 'all'"),
    ({"replies_only": [3]}, "replies_only is"), ({"head": ["tied"]}, "head is"), ({"num_heads": 7}, "num_heads 7"),
    ({"seq_len": {}}, "seq_len is {}")])
def test_a_wrong_config_json_is_one_message_with_file_and_value(values, said):
    with pytest.raises(TinyGPTError) as caught:
        from_json(values, "runs/a/config.json")
    assert said in str(caught.value) and str(caught.value).startswith("runs/a/config.json")


@pytest.mark.parametrize("error, said", [(TinyGPTError("wrong; do right."), "Error: wrong; do right.\n"),
                                         (FileExistsError(17, "File exists", "out"), "Error: out: File exists\n")])
def test_a_command_turns_a_users_mistake_into_one_message(error, said, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit) as caught:
        run_command(main)
    assert caught.value.code == 2
    assert capsys.readouterr().err == said


def test_a_command_does_not_hide_a_fault_of_the_program():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0)


def test_a_setting_of_earlier_versions_is_passed_over():
    assert from_json({**to_json(Config()), "role_shift": True}, "config.json") == Config()
