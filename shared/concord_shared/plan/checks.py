"""Which sections of a plan go together: what one asks of the others, which every plan is held to.

A strategy's own wants stand in `together.py`, which `concord plans --together` asks too.
"""

from typing import TYPE_CHECKING

from concord_shared.plan.models import (
    IMAGE_MODELS,
    LANGUAGE_MODELS,
    RECOMMENDERS,
    TOKEN_MODELS,
    PretrainedModel,
)
from concord_shared.plan.preparation import Preprocessing
from concord_shared.plan.privacy import DifferentialPrivacy, Robust, robust_problem
from concord_shared.plan.rounds import Compression
from concord_shared.plan.statistics import StatisticsSection
from concord_shared.plan.together import why_not_together

if TYPE_CHECKING:
    from concord_shared.plan.schema import Plan

__all__ = ["check_sections"]

COLUMNS_MAX_OF_PAIRS = 256
DENOISE_SIDE_MIN = 16
COMPRESSED = ("fedavg", "fedavgm", "fedprox", "fedadam", "fedyogi", "fedadagrad", "fedbn", "ditto", "fedrep")
"""Strategies that send a difference and nothing else."""


def check_sections(plan: "Plan") -> None:
    """Raises: ValueError: one section does not go with another; why, and what does."""
    if plan.statistics is not None:
        _statistics(plan, plan.statistics)
        return
    if plan.model.name == "none":
        raise ValueError('a plan of kind = "train" names a model that it trains; see: concord plans')
    if isinstance(plan.model, IMAGE_MODELS) and plan.data.input != "image":
        raise ValueError(f'model {plan.model.name} reads images: expected data.input = "image"')
    if (plan.model.name in RECOMMENDERS) != (plan.data.input == "ratings"):
        raise ValueError(f'data.input = "ratings" and the models {", ".join(RECOMMENDERS)} need each other')
    if plan.data.task == "own" and plan.model.name != "plugin":
        raise ValueError('data.task = "own" is learned by a model of another wheel: expected model.name = "plugin"')
    _tokens(plan)
    solves_both = plan.model.name in ("mlp", "own", "plugin", *LANGUAGE_MODELS, *RECOMMENDERS)
    if not solves_both and (plan.model.name == "linear-regression") != (plan.data.task == "regression"):
        raise ValueError(f"model {plan.model.name} does not solve data.task = {plan.data.task!r}")
    if plan.strategy.name == "least-squares" and (plan.model.name != "linear-regression" or plan.rounds.count != 1):
        raise ValueError("strategy least-squares needs model linear-regression and rounds.count = 1")
    if getattr(plan.model, "norm", "") == "batch" and (problem := plan.training.batch_norm_problem):
        raise ValueError(problem)
    _preparation(plan, plan.preprocessing, plan.data.input)
    if plan.preprocessing.scope != "none":
        _ranges(plan, "fitted preprocessing sums fixed-point integers")
    if plan.privacy.dp is not None:
        _covered(plan, plan.privacy.dp)
    if isinstance(plan.privacy, Robust):
        _robust(plan, plan.privacy)
    if plan.compression is not None:
        _compression(plan, plan.compression)
    if problem := why_not_together(plan):
        raise ValueError(problem)


def _tokens(plan: "Plan") -> None:
    tokens = plan.preprocessing.tokens
    if (tokens is not None) != (plan.model.name in TOKEN_MODELS):
        raise ValueError(
            f"[preprocessing.tokens] belongs to the models {', '.join(TOKEN_MODELS)}, and they to it; got model "
            f"{plan.model.name}"
        )
    if (plan.model.name in LANGUAGE_MODELS) != (plan.data.task == "language-model"):
        raise ValueError(
            f'model {plan.model.name} does not solve data.task = "{plan.data.task}": '
            f'{" and ".join(LANGUAGE_MODELS)} are for "language-model", and only they'
        )
    named = plan.model.sha256 if isinstance(plan.model, PretrainedModel) else ""
    if tokens is not None and tokens.pretrained != named:
        raise ValueError(
            f"preprocessing.tokens.pretrained and model.sha256 must be equal, got {_short(tokens.pretrained)} and "
            f"{_short(named)}: a pretrained model reads the tokens of its own tokenizer, and no other model does"
        )
    if tokens is not None and not named and tokens.length > plan.data.length_max + 1:
        raise ValueError(
            f"preprocessing.tokens.length: a text of at most data.length_max = {plan.data.length_max} characters "
            f"has never {tokens.length} tokens; lower it"
        )


def _short(sha256: str) -> str:
    return f"{sha256[:12]}…" if sha256 else "none"


def _ranges(plan: "Plan", why: str) -> None:
    unbounded = [c.name for c in plan.data.columns if c.kind == "number" and c.range is None]
    if unbounded:
        raise ValueError(f"{why}, so each number column needs range = [low, high]; missing for: {', '.join(unbounded)}")


def _preparation(plan: "Plan", wanted: Preprocessing, kind: str) -> None:
    """Refuses a step that the contract's kind of input does not have: none is ever left out silently."""
    own = {
        "image": {"denoise": wanted.denoise != "none", "augment": wanted.augment is not None},
        "text": {"text": wanted.text is not None, "tokens": wanted.tokens is not None},
        "table": {
            "normalise": bool(wanted.normalise),
            "outliers": wanted.outliers is not None,
            "outside": wanted.outside != "refuse",
        },
    }
    for owner, steps in own.items():
        if owner != kind and (given := [name for name, is_on in steps.items() if is_on]):
            raise ValueError(f'preprocessing.{given[0]} is for data.input = "{owner}", got "{kind}"')
    prepared = (wanted.text is None) != (wanted.tokens is None)
    if kind == "text" and (not prepared or wanted.standardise or wanted.missing != "refuse"):
        raise ValueError(
            'data.input = "text" has one of the sections [preprocessing.text] and [preprocessing.tokens], and '
            "nothing to standardise or impute"
        )
    if kind in ("ratings", "array") and wanted != Preprocessing(scale=wanted.scale):
        raise ValueError(f'data.input = "{kind}": there is nothing to prepare; leave [preprocessing] out')
    if kind == "image" and plan.data.dtype != "uint8" and (wanted.standardise or wanted.denoise != "none"):
        raise ValueError('standardise and denoise of images need data.dtype = "uint8"')
    if wanted.denoise != "none" and min(plan.data.shape[1:]) < DENOISE_SIDE_MIN:
        raise ValueError(
            f"preprocessing.denoise needs images of at least {DENOISE_SIDE_MIN}×{DENOISE_SIDE_MIN}: the strokes of "
            "smaller ones look like noise"
        )
    if wanted.scope == "federated" and wanted.fits_quantiles and plan.privacy.mode == "plain":
        raise ValueError(
            "preprocessing.outliers and normalise follow from quantiles, of many small counts, and with "
            'privacy.mode = "plain" the coordinator would see those of each node. Set privacy.mode = "private", or '
            'preprocessing.scope = "per-node"'
        )
    if wanted.augment is not None and wanted.augment.shift >= min(plan.data.shape[1:], default=0):
        raise ValueError("preprocessing.augment.shift: moves a whole image away; lower it")


def _statistics(plan: "Plan", wanted: StatisticsSection) -> None:
    if plan.kind != "statistics":
        raise ValueError('[statistics] belongs to kind = "statistics"')
    if plan.data.input == "image" and plan.data.dtype != "uint8":
        raise ValueError('statistics of images need data.dtype = "uint8"')
    if plan.data.input in ("ratings", "array"):
        raise ValueError(
            f'statistics of data.input = "{plan.data.input}" are not offered; describe the columns as a table'
        )
    _ranges(plan, "statistics are sums of fixed-point integers")
    binned = bool(wanted.quantiles or wanted.bins or "extremes" in wanted.of)
    if binned and plan.privacy.mode == "plain" and plan.privacy.dp is None:
        raise ValueError(
            'quantiles, extremes and histograms are made of many small counts, and with privacy.mode = "plain" the '
            'coordinator would see those of each node. Set privacy.mode = "private", or give [privacy.dp]'
        )
    if plan.rounds.count != 1:
        raise ValueError("rounds.count: statistics are asked for once; leave it out")
    numbers = sum(column.kind == "number" for column in plan.data.columns)
    if "correlation" in wanted.of and (plan.data.input != "table" or numbers > COLUMNS_MAX_OF_PAIRS):
        raise ValueError(f"correlation needs a table with at most {COLUMNS_MAX_OF_PAIRS} number columns")
    if plan.privacy.mode == "robust":
        raise ValueError(
            'privacy.mode = "robust": statistics over nodes are a plain sum, which one node can bend. Choose '
            'privacy.mode = "plain" or "private"'
        )
    dp = plan.privacy.dp
    if dp is not None and (dp.unit != "record" or dp.clip != 1):
        raise ValueError(
            'privacy.dp of statistics hides records: set unit = "record", and clip = 1, as what one record adds is '
            "bounded by the contract's ranges"
        )
    if dp is not None and "sites" in wanted.of:
        raise ValueError("privacy.dp does not cover sites: what one record adds to them has no bound. Leave it out")


def _covered(plan: "Plan", dp: DifferentialPrivacy) -> None:
    """Refuses what would leave without noise, or would make one record count in more than its own gradient."""
    fitted = plan.preprocessing.scope != "none" and plan.fits_something
    if plan.strategy.name == "least-squares":
        raise ValueError("privacy.dp covers training by gradients; least-squares sends exact sums of products")
    if plan.needs_statistics:
        raise ValueError(
            'privacy.dp does not cover the exact sums of preprocessing.scope = "federated": leave standardise, '
            "normalise, outliers, impute and text off"
        )
    if dp.unit == "node":
        if dp.clip != plan.rounds.update_bound:
            raise ValueError(
                'with privacy.dp.unit = "node" the clip is the bound of an Update: set privacy.dp.clip and '
                f"rounds.update_bound equal, got {dp.clip:g} and {plan.rounds.update_bound:g}"
            )
        return
    if plan.data.input == "ratings":
        raise ValueError(
            'with privacy.dp.unit = "record" a rating would count in its user too, and so in the gradients of all '
            'ratings of that user: choose unit = "node"'
        )
    if fitted:
        raise ValueError(
            'with privacy.dp.unit = "record" nothing may be fitted to the rows before training, as each of them '
            "would then change all others: leave preprocessing.scope at none"
        )
    if plan.training.gradient_clip:
        raise ValueError('training.gradient_clip: with privacy.dp.unit = "record" its place is privacy.dp.clip')
    if plan.training.precision != "fp32":
        raise ValueError('privacy.dp.unit = "record" needs training.precision = "fp32"')
    if plan.training.micro_batch or plan.training.recompute_activations:
        raise ValueError(
            'training.micro_batch and recompute_activations: with privacy.dp.unit = "record" gradients are made '
            "record by record, and clipped before they are added; leave both off"
        )


def _robust(plan: "Plan", privacy: Robust) -> None:
    """What one node could bend without its Update standing out is refused, not explained away."""
    if plan.strategy.name == "least-squares":
        raise ValueError(
            'privacy.mode = "robust" compares Updates of models; strategy least-squares sums exact moments, in '
            "which one node can hide anything. Choose another strategy or mode"
        )
    if plan.needs_statistics:
        raise ValueError(
            'privacy.mode = "robust": statistics over nodes are a plain sum, which one node can bend. Set '
            'preprocessing.scope = "per-node", or choose another mode'
        )
    if plan.noise == "central" and privacy.rule != "clipped-mean":
        raise ValueError(
            f'privacy.dp.unit = "node" in robust mode hides a node in a sum, and rule {privacy.rule} makes none: '
            'one node may move it by much more. Set privacy.rule = "clipped-mean", or privacy.dp.unit = "record"'
        )
    if plan.noise == "central" and privacy.quarantine_after:
        raise ValueError(
            'privacy.dp.unit = "node" in robust mode: whom one node\'s Update puts into quarantine changes the sum '
            "by more than that Update, and no noise hides it. Set privacy.quarantine_after = 0"
        )
    for key in ("cohort", "quorum"):
        share = getattr(plan.rounds, key)
        if isinstance(share, int) and (problem := robust_problem(privacy, share, f"rounds.{key}")):
            raise ValueError(problem)


def _compression(plan: "Plan", wanted: Compression) -> None:
    if plan.strategy.name not in COMPRESSED:
        raise ValueError(
            f"compression leaves part of a difference for later; strategy {plan.strategy.name} sends other things "
            f"as well, which must arrive whole. It goes with {', '.join(COMPRESSED)}"
        )
    if plan.privacy.mode == "private" and wanted.kind in ("fp16", "int8"):
        raise ValueError(
            f'compression.kind = "{wanted.kind}" and privacy.mode = "private": masks hide integers of one ring, '
            'and numbers with a scale of their own are none. Choose "rand-k" or "narrow"'
        )
    if plan.noise in ("distributed", "central"):
        raise ValueError(
            'privacy.dp.unit = "node" covers what one round sends, and compression sends some of it later, a '
            'second time: leave it out, or choose privacy.dp.unit = "record"'
        )
    if wanted.kind == "narrow" and plan.rounds.ring_bits != 32:
        raise ValueError('compression.kind = "narrow" replaces rounds.ring_bits: leave it at 32')
