"""Small plans and messages that many tests start from."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Message
from numpy.typing import NDArray

from concord_shared.blocks import Block
from concord_shared.messages import Offer, answer, offer_message
from concord_shared.plan import Plan, parse_plan

IMAGES = """
name = "images"
[data]
task = "classification"
input = "image"
shape = [1, 8, 8]
classes = ["a", "b", "c"]
[model]
name = "logistic-regression"
"""

TABLE = """
name = "table"
[data]
task = "classification"
input = "table"
target = "ill"
classes = ["no", "yes"]
[[data.columns]]
name = "age"
range = [0, 120]
[[data.columns]]
name = "city"
kind = "category"
categories = ["bonn", "köln", "ulm"]
[[data.columns]]
name = "dose"
range = [-5, 5]
[preprocessing]
scope = "federated"
standardise = true
missing = "impute"
encode = "one-hot-drop-first"
[model]
name = "logistic-regression"
"""

REGRESSION = """
name = "regression"
[data]
task = "regression"
input = "table"
target = "y"
target_range = [-100, 100]
[[data.columns]]
name = "x0"
range = [-8, 8]
[[data.columns]]
name = "x1"
range = [-8, 8]
[[data.columns]]
name = "x2"
range = [-8, 8]
[model]
name = "linear-regression"
"""

LANGUAGE = """
name = "language"
[data]
task = "language-model"
input = "text"
text = "words"
length_max = 9
[preprocessing.tokens]
length = 9
alphabet = " abcdefgh"
[model]
name = "gpt-mini"
layers = 2
width = 16
heads = 2
"""

TOPICS = """
name = "topics"
[data]
task = "classification"
input = "text"
text = "words"
length_max = 100
classes = ["a", "b", "c"]
[preprocessing.tokens]
unit = "word"
length = 8
vocabulary = 64
[model]
name = "text-encoder"
layers = 2
width = 16
heads = 2
"""


RATINGS = """
name = "ratings"
[data]
task = "regression"
input = "ratings"
user = "guest"
item = "place"
target = "stars"
target_range = [0, 4]
items = ["a", "b", "c"]
[model]
name = "matrix-factorisation"
factors = 2
[training]
batch_size = 4096
"""
RANKING = RATINGS.replace("regression", "ranking").replace("target_range = [0, 4]\n", "")


def plan_of(text: str, *overrides: str) -> Plan:
    return parse_plan(text, "plan.toml", overrides).plan


def one_column_plan(*overrides: str, column_range: str = "[-100, 100]") -> Plan:
    """Linear regression on one number column."""
    start, _, _ = REGRESSION.partition('[[data.columns]]\nname = "x1"')
    text = start.replace("range = [-8, 8]", f"range = {column_range}" if column_range else "")
    return plan_of(text + '[model]\nname = "linear-regression"\n', *overrides)


def offer_of(**changes: Any) -> Offer:
    fields: dict[str, Any] = {
        "run": "run-1",
        "kind": "train",
        "round_number": 3,
        "attempt": 1,
        "node": "alpha",
        "plan_digest": "p" * 64,
        "model_digest": "m" * 64,
        "layout_digest": "l" * 64,
        "nodes_max": 10,
        "rows_max": 1024,
    }
    return Offer(**{**fields, **changes})


def request_of(offer: Offer, node_id: int = 2) -> Message:
    return offer_message(offer, None, node_id, 1.7e9)


def reply_of(offer: Offer, blocks: Mapping[str, NDArray[Any]]) -> Message:
    return answer(request_of(offer), offer, blocks, {"rows": 1})


def named(blocks: tuple[Block, ...], name: str) -> Block:
    return next(block for block in blocks if block.name == name)


def softmax(scores: NDArray[np.float64]) -> NDArray[np.float32]:
    exponents = np.exp(scores - scores.max(1, keepdims=True))
    return (exponents / exponents.sum(1, keepdims=True)).astype(np.float32)
