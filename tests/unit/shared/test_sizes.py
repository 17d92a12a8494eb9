"""How much a plan makes everyone hold is known before anything is built."""

import pytest

from concord_shared.errors import PlanError
from concord_shared.metrics import no_sums
from concord_shared.models import MODELS, build_model, layout_of
from concord_shared.plan import Plan
from concord_shared.plan.models import RECOMMENDERS, TOKEN_MODELS
from concord_shared.plan.sizes import check_size, parameters
from helpers import IMAGES, LANGUAGE, RANKING, RATINGS, REGRESSION, TABLE, TOPICS, plan_of

OTHERS = ("linear-regression", *TOKEN_MODELS, *RECOMMENDERS)
"""Models that read no images."""
HUGE = ["model.name=mlp", "model.hidden=[65536, 65536]"]
"""4.3 thousand million parameters: 17 GB."""


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 29, 31)])
@pytest.mark.parametrize("name", [name for name in MODELS if name not in OTHERS])
def test_parameters_are_those_of_the_model_that_is_built(name: str, shape: tuple[int, ...]) -> None:
    hidden = ["model.hidden=[7, 5]"] if name == "mlp" else []
    plan = plan_of(IMAGES, f"data.shape={list(shape)}", f"model.name={name}", *hidden)
    assert parameters(plan) == layout_of(plan, build_model(plan)).size


@pytest.mark.parametrize(
    "plan",
    [
        plan_of(TABLE),
        plan_of(REGRESSION),
        plan_of(TABLE, "preprocessing.encode=one-hot"),
        plan_of(LANGUAGE),
        plan_of(LANGUAGE, "model.layers=3", "model.width=24"),
        plan_of(TOPICS),
    ],
)
def test_parameters_of_tables_and_texts_too(plan: Plan) -> None:
    assert parameters(plan) == layout_of(plan, build_model(plan)).size


@pytest.mark.parametrize("task", [RATINGS, RANKING])
@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.family == "recommender"])
def test_parameters_of_recommenders_too(name: str, task: str) -> None:
    plan = plan_of(task, f"model={{name='{name}', factors=5}}")
    assert parameters(plan) == layout_of(plan, build_model(plan)).size


@pytest.mark.parametrize("shape", [(7,), (2, 3), (2, 2, 2, 2)])
def test_of_arrays_a_wheel_says_it_whatever_their_shape(shape: tuple[int, ...]) -> None:
    model = {"name": "plugin", "package": "theirs", "model": "net", "sha256": "0" * 64, "parameters": 600}
    data = {"task": "own", "input": "array", "shape": shape, "dtype": "float32", "target_shape": [1]}
    assert parameters(plan_of(IMAGES).with_changes(model=model, data=data)) == 600


def test_an_own_model_has_no_size_that_a_plan_knows() -> None:
    with pytest.raises(PlanError, match="own code"):
        parameters(plan_of(IMAGES, "model={name='own', source='x', sha256='" + "0" * 64 + "'}"))


def test_a_model_that_no_machine_holds_is_refused_and_never_built() -> None:
    with pytest.raises(PlanError, match=r"mlp has 4299489283 parameters.*at most 100 \(parameters_max\)"):
        check_size(plan_of(IMAGES, *HUGE), 100, 1 << 30)


def test_metrics_that_no_machine_holds_are_refused() -> None:
    plan = plan_of(IMAGES, f"data.classes={[str(label) for label in range(30)]}")
    size = len(no_sums(plan.data).vector)
    check_size(plan, 1 << 30, size)
    with pytest.raises(PlanError, match=f"30 classes are {size} counts.*metrics_max"):
        check_size(plan, 1 << 30, size - 1)


def test_moments_of_many_columns_are_refused() -> None:
    plan = plan_of(REGRESSION, "strategy.name=least-squares", "rounds.count=1")
    check_size(plan, 15, 5)  # 1, three columns and y: 5 · 6 / 2
    with pytest.raises(PlanError, match="15 moments"):
        check_size(plan, 14, 5)


def test_layers_are_counted() -> None:
    with pytest.raises(PlanError, match="hidden"):
        plan_of(IMAGES, "model.name=mlp", f"model.hidden={[1] * 101}")
