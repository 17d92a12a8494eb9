"""Weights that others trained: from a directory that brings data alone, bound by hash, computed as their authors do."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pretrained_models import decoder_directory, encoder_directory
from typer.testing import CliRunner

from concord_client.passes import recompute_activations
from concord_client.trainer import Workbench
from concord_local.cli import app
from concord_shared.errors import UsageError
from concord_shared.models import new_model, new_vector, partition_of
from concord_shared.plan.schema import Plan
from concord_shared.preprocessing import unfitted
from concord_shared.pretrained.store import Pretrained, add, find, kept, store_folder
from helpers import LANGUAGE, TOPICS, plan_of

CPU = torch.device("cpu")
ADAPTED = 2 * 2 * 4 * (16 + 16)  # layers × (query, value) × rank × (inputs + outputs)
HEAD = 16 * 3 + 3
TEXTS = np.array(["a b c", "h g f e d c b a a b c d e", "", "d"])


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("hub")
    return {"encoder": encoder_directory(folder / "tiny-bert"), "decoder": decoder_directory(folder / "tiny-gpt2")}


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CONCORD_PRETRAINED", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture
def encoder(directories: dict[str, Path]) -> Pretrained:
    return add(directories["encoder"])


@pytest.fixture
def decoder(directories: dict[str, Path]) -> Pretrained:
    return add(directories["decoder"])


def classifier(found: Pretrained, length: int = 8, **changes: Any) -> Plan:
    lora = {"rank": 4, "targets": ["query", "value"]}
    model = {"package": "tiny-bert", "sha256": found.sha256, "parameters": ADAPTED + HEAD, "lora": lora} | changes
    return plan_of(TOPICS).with_changes(
        model={"name": "pretrained-encoder"} | model,
        preprocessing={"tokens": {"length": length, "pretrained": found.sha256}},
    )


def language(found: Pretrained, **changes: Any) -> Plan:
    lora = {"rank": 2, "targets": ["c_attn"]}
    size = 2 * 2 * (16 + 48)
    model = {"package": "tiny-gpt2", "sha256": found.sha256, "parameters": size, "lora": lora} | changes
    return plan_of(LANGUAGE).with_changes(
        model={"name": "pretrained-decoder"} | model,
        preprocessing={"tokens": {"length": 8, "pretrained": found.sha256}},
    )


def copied(directory: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copied"
    folder.mkdir()
    for each in directory.iterdir():
        (folder / each.name).write_bytes(each.read_bytes())
    return folder


class TestStore:
    def test_what_is_added_is_found_by_its_hash(self, encoder: Pretrained, directories: dict[str, Path]) -> None:
        assert encoder.folder == store_folder() / encoder.sha256
        assert (encoder.name, encoder.architecture, encoder.vocabulary) == ("tiny-bert", "BertModel", 12)
        assert find(encoder.sha256).sha256 == encoder.sha256
        assert [each.sha256 for each in kept()] == [encoder.sha256]
        assert add(directories["encoder"]).sha256 == encoder.sha256  # once more changes nothing

    def test_other_weights_have_another_hash(self, encoder: Pretrained, decoder: Pretrained) -> None:
        assert len({each.sha256 for each in kept()}) == 2

    def test_what_was_changed_is_not_used(self, encoder: Pretrained) -> None:
        config = encoder.folder / "config.json"
        config.write_text(config.read_text().replace('"gelu"', '"relu"'))
        with pytest.raises(UsageError, match="was changed"):
            find(encoder.sha256)
        assert kept() == []

    def test_what_is_not_here_is_named_with_what_to_do(self) -> None:
        with pytest.raises(UsageError, match=r"tiny-bert .* is not on this machine.*pretrained add DIR"):
            find("0" * 64, "tiny-bert")

    @pytest.mark.parametrize(
        ("file", "content", "message"),
        [
            ("pytorch_model.bin", "x", "can run code"),
            ("old/weights.PKL", "x", "can run code"),
            ("modeling_tiny.py", "x", "never code"),
            ("config.json", '{"auto_map": {"AutoModel": "modeling.Tiny"}}', "auto_map"),
            ("config.json", '{"quantization_config": {"bits": 4}}', "quantised"),
            ("config.json", '{"transformers_weights": "other.safetensors"}', "names other files"),
            ("config.json", '{"attn_implementation": "hub/kernels"}', "attn_implementation"),
            ("config.json", "[" * 100_000, "expected JSON"),
            ("config.json", "[]", "expected a JSON object"),
            ("config.json", "{", "expected JSON"),
            ("model.safetensors", "\x80\x04not tensors", "not safetensors"),
        ],
    )
    def test_what_could_run_is_refused(
        self, directories: dict[str, Path], tmp_path: Path, file: str, content: str, message: str
    ) -> None:
        folder = tmp_path / "copy"
        for each in directories["encoder"].iterdir():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / each.name).write_bytes(each.read_bytes())
        (folder / file).write_text(content, "latin-1")
        with pytest.raises(UsageError, match=message):
            add(folder)
        assert kept() == []

    @pytest.mark.parametrize(
        ("file", "changes", "message"),
        [
            ("tokenizer.json", "{", r"tokenizer\.json: expected JSON"),
            ("tokenizer.json", "[]", r"tokenizer\.json: expected a JSON object"),
            ("tokenizer.json", "{}", r"tokenizer\.json: not a tokenizer: .*download the directory again"),
            ("config.json", {"architectures": [3]}, r"config\.json: architectures: expected a list of words"),
            ("config.json", {"architectures": "BertModel"}, r"config\.json: architectures: expected a list of words"),
            ("config.json", {"vocab_size": -4}, "vocab_size: expected a whole number above 0, got '-4'"),
            ("config.json", {"vocab_size": "many"}, "vocab_size: expected a whole number above 0, got 'many'"),
            ("config.json", {"hidden_size": 10**9}, r"config\.json: (describes a tensor|transformers cannot build)"),
            ("config.json", {"vocab_size": 13}, r"embeddings.* of shape \[13, 16\], and the weights hold one of \[12"),
            ("config.json", {"num_hidden_layers": 10**9}, "describes 1000000000 layers, and the weights hold"),
            ("config.json", {"num_attention_heads": 3}, "transformers cannot build what it describes: ValueError"),
            ("config.json", {"model_type": "none-such"}, "transformers cannot build what it describes: ValueError"),
        ],
    )
    def test_what_cannot_be_built_is_refused(
        self, directories: dict[str, Path], tmp_path: Path, file: str, changes: Any, message: str
    ) -> None:
        folder = copied(directories["encoder"], tmp_path)
        if isinstance(changes, dict):
            changes = json.dumps(json.loads((folder / file).read_text("utf-8")) | changes)
        (folder / file).write_text(changes, "utf-8")
        with pytest.raises(UsageError, match=message):
            add(folder)
        assert kept() == []

    @pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
    def test_a_file_that_is_missing_is_named(self, directories: dict[str, Path], tmp_path: Path, missing: str) -> None:
        folder = tmp_path / "copy"
        folder.mkdir()
        for each in directories["encoder"].iterdir():
            if each.name != missing:
                (folder / each.name).write_bytes(each.read_bytes())
        with pytest.raises(UsageError, match=missing):
            add(folder)

    def test_weights_in_several_files(self, directories: dict[str, Path], tmp_path: Path) -> None:
        from transformers import BertModel

        folder = tmp_path / "parts"
        BertModel.from_pretrained(directories["encoder"]).save_pretrained(folder, max_shard_size="4KB")
        (folder / "tokenizer.json").write_bytes((directories["encoder"] / "tokenizer.json").read_bytes())
        assert len(list(folder.glob("model-*.safetensors"))) > 1
        one, parts = add(directories["encoder"]), add(folder)
        assert one.sha256 != parts.sha256
        first, second = (new_vector(classifier(each))[1] for each in (one, parts))
        assert np.array_equal(first, second)
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../outside.safetensors"}}')
        with pytest.raises(UsageError, match="files beside it"):
            add(folder)
        torch.save({}, folder / "weights.dat")
        for odd in ('{"a": "weights.dat"}', '{"a": ["x"]}', '{"a": "model.safetensors.index.json"}'):
            (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {odd}}}')
            with pytest.raises(UsageError, match="files beside it"):
                add(folder)

    def test_a_pipe_is_no_file(self, directories: dict[str, Path], tmp_path: Path) -> None:
        folder = tmp_path / "copy"
        folder.mkdir()
        os.mkfifo(folder / "config.json")
        with pytest.raises(UsageError, match=r"config\.json is missing"):
            add(folder)

    def test_a_name_that_no_plan_can_use(self, directories: dict[str, Path]) -> None:
        with pytest.raises(UsageError, match="--name"):
            add(directories["encoder"], "a\nb")
        assert add(directories["encoder"], "another.name").name == "another.name"

    def test_by_hand(self, directories: dict[str, Path]) -> None:
        run = CliRunner().invoke(app, ["pretrained", "add", str(directories["encoder"]), "--json"])
        sha256 = json.loads(run.stdout)["sha256"]
        listed = CliRunner().invoke(app, ["pretrained", "list"])
        assert "tiny-bert: BertModel" in listed.stdout
        assert sha256 in listed.stdout


class TestTokens:
    def test_are_the_tokenizers_own_and_two(self, encoder: Pretrained) -> None:
        made = unfitted(classifier(encoder)).transform(TEXTS)
        cls, sep, first = 2 + 2, 3 + 2, 4 + 2
        assert made[0].tolist() == [cls, first, first + 1, first + 2, sep, 0, 0, 0]
        assert made[1].tolist() == [cls, *range(first + 7, first + 1, -1), sep]  # cut, and still ended
        assert made[2].tolist() == [cls, sep, 0, 0, 0, 0, 0, 0]
        assert unfitted(classifier(encoder)).counts(TEXTS) == {"cut": 1, "padded": 3, "unknown": 0}

    def test_more_of_them_than_the_weights_know_is_refused(self, directories: dict[str, Path], tmp_path: Path) -> None:
        folder = copied(directories["encoder"], tmp_path)
        text = json.loads((folder / "tokenizer.json").read_text())
        text["model"]["vocab"]["huge"] = 1 << 20
        (folder / "tokenizer.json").write_text(json.dumps(text))
        with pytest.raises(UsageError, match="has the token 1048576, and its weights know 12"):
            new_vector(classifier(add(folder)))

    def test_marks_that_are_longer_than_a_text_may_be_are_cut(
        self, directories: dict[str, Path], tmp_path: Path
    ) -> None:
        folder = copied(directories["encoder"], tmp_path)
        text = json.loads((folder / "tokenizer.json").read_text())
        text["post_processor"]["special_tokens"]["[CLS]"]["ids"] = [2] * 50
        text["post_processor"]["special_tokens"]["[CLS]"]["tokens"] = ["[CLS]"] * 50
        (folder / "tokenizer.json").write_text(json.dumps(text))
        assert unfitted(classifier(add(folder))).transform(TEXTS).shape == (4, 8)

    def test_belong_to_the_same_model(self, encoder: Pretrained) -> None:
        mine = f"{encoder.sha256[:12]}…"
        with pytest.raises(ValueError, match=rf"must be equal, got {mine} and 000000000000…: "):
            classifier(encoder, sha256="0" * 64)
        with pytest.raises(ValueError, match=rf"must be equal, got {mine} and none: "):
            plan_of(TOPICS).with_changes(preprocessing={"tokens": {"length": 8, "pretrained": encoder.sha256}})


class TestEncoder:
    def test_says_what_its_authors_code_says(self, encoder: Pretrained, directories: dict[str, Path]) -> None:
        from transformers import BertModel

        plan = classifier(encoder)
        tokens = torch.from_numpy(unfitted(plan).transform(TEXTS))
        model = new_model(plan).eval()
        theirs = BertModel.from_pretrained(directories["encoder"], add_pooling_layer=False).eval()
        with torch.no_grad():
            got = model(tokens)
            for row, logits in zip(tokens, got, strict=True):
                numbers = row[row != 0][None] - 2  # by itself, without any padding
                mean = theirs(input_ids=numbers).last_hidden_state.mean(1)
                assert torch.allclose(model.head(mean)[0], logits, atol=1e-5)

    def test_only_adapters_and_head_travel(self, encoder: Pretrained) -> None:
        plan = classifier(encoder)
        layout, start = new_vector(plan)
        assert layout.size == ADAPTED + HEAD
        assert {name.split(".")[-1] for name, _ in layout.entries} == {"down", "up", "weight", "bias"}
        assert np.array_equal(start, new_vector(plan)[1])

    def test_without_lora_all_of_it_travels_and_begins_as_it_was(
        self, encoder: Pretrained, directories: dict[str, Path]
    ) -> None:
        from safetensors.numpy import load_file

        theirs = {k: v for k, v in load_file(directories["encoder"] / "model.safetensors").items() if "pooler" not in k}
        size = sum(each.size for each in theirs.values()) + HEAD
        layout, start = new_vector(classifier(encoder, lora=None, parameters=size))
        ours = layout.split(start)
        for name, weights in theirs.items():
            assert np.array_equal(ours[f"base.{name}"], weights)

    def test_another_number_of_parameters_than_the_plan_says(self, encoder: Pretrained) -> None:
        with pytest.raises(UsageError, match=rf"{ADAPTED + HEAD} parameters .* model\.parameters = 7"):
            new_vector(classifier(encoder, parameters=7))

    def test_a_layer_that_is_not_there_is_named(self, encoder: Pretrained) -> None:
        with pytest.raises(UsageError, match=r"no dense layer 'q_proj'; its layers: dense, key, query, value"):
            new_vector(classifier(encoder, lora={"targets": ["q_proj"]}))

    def test_longer_texts_than_it_has_places_for(self, encoder: Pretrained) -> None:
        with pytest.raises(UsageError, match="at most 12 tokens"):
            new_vector(classifier(encoder, length=13))

    def test_weights_that_are_missing_do_not_begin_at_random(
        self, directories: dict[str, Path], tmp_path: Path
    ) -> None:
        from safetensors.numpy import load_file, save_file

        folder = tmp_path / "copy"
        folder.mkdir()
        for each in directories["encoder"].iterdir():
            (folder / each.name).write_bytes(each.read_bytes())
        weights = load_file(folder / "model.safetensors")
        del weights["encoder.layer.1.attention.self.query.weight"]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(UsageError, match=r"lack encoder\.layer\.1\.attention\.self\.query\.weight"):
            new_vector(classifier(add(folder)))

    def test_activations_that_are_worked_out_again_give_the_same_gradient(self, encoder: Pretrained) -> None:
        plan = classifier(encoder)
        tokens = torch.from_numpy(unfitted(plan).transform(TEXTS))
        gradients = []
        for again in (False, True):
            model = new_model(plan).train()
            if again:
                recompute_activations(model)
            torch.manual_seed(1)
            model(tokens).square().sum().backward()
            gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))

    def test_learns(self, encoder: Pretrained) -> None:
        plan = classifier(encoder).with_changes(training={"optimiser": "adamw", "learning_rate": 0.02})
        bench = Workbench(plan, CPU)
        texts = np.array(["a a b", "b a b", "h g g", "g h h", "d e", "e d d"] * 4)
        rows = bench.rows(unfitted(plan).transform(texts), np.array([0, 0, 1, 1, 2, 2] * 4))
        bench.load(new_vector(plan)[1])
        before = bench.evaluate(rows).figures()["loss"]
        frozen = [name for name, each in bench.model.named_parameters() if not each.requires_grad]
        held = {name: bench.model.get_parameter(name).clone() for name in frozen}
        bench.train(rows, 0.02, 0, epochs=60)
        assert bench.evaluate(rows).figures()["loss"] < 0.5 * before  # type: ignore[operator]
        assert all(torch.equal(bench.model.get_parameter(name), each) for name, each in held.items())


class TestDecoder:
    def test_says_what_its_authors_code_says(self, decoder: Pretrained, directories: dict[str, Path]) -> None:
        from transformers import GPT2LMHeadModel

        plan = language(decoder)
        texts = np.array(["a b c d e f g h", "h h a", "c d"])
        bench = Workbench(plan, CPU)
        made = unfitted(plan).transform(texts)
        bench.load(new_vector(plan)[1])
        told = bench.evaluate(bench.rows(made, np.zeros(3))).figures()
        theirs, losses = GPT2LMHeadModel.from_pretrained(directories["decoder"]).eval(), []
        with torch.no_grad():
            for row in torch.from_numpy(made):
                numbers = row[row != 0][None] - 2
                logits = theirs(input_ids=numbers).logits[0, :-1].log_softmax(1)
                losses += (-logits[range(len(logits)), numbers[0, 1:]]).tolist()
        assert told["tokens"] == len(losses) == 7 + 2 + 1
        assert told["loss"] == pytest.approx(np.mean(losses), rel=1e-5)

    def test_its_dense_layers_are_adapted_though_they_are_no_linear_ones(self, decoder: Pretrained) -> None:
        plan = language(decoder)
        model = new_model(plan)
        assert partition_of(plan, model).shared.size == 2 * 2 * (16 + 48)
        bench = Workbench(plan.with_changes(training={"optimiser": "adamw", "learning_rate": 0.02}), CPU)
        rows = bench.rows(unfitted(plan).transform(np.array(["a b c d e f g h"] * 8)), np.zeros(8))
        bench.load(new_vector(plan)[1])
        before = bench.evaluate(rows).figures()["loss"]
        bench.train(rows, 0.02, 0, epochs=20)
        assert bench.evaluate(rows).figures()["loss"] < before  # type: ignore[operator]

    def test_an_encoder_is_no_decoder(self, encoder: Pretrained) -> None:
        with pytest.raises(UsageError, match="tiny-bert"):
            new_vector(language(encoder, package="tiny-bert"))
