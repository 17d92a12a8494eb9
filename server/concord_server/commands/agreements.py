"""`concord agreement …`: request, offer, agree, withdraw. Nobody signs what was not shown on this machine."""

import json
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from concord_server.commands.output import coordinator, show_items, show_record
from concord_server.commands.signing import Key, OnBehalf, signing_key
from concord_shared.commands import Json, readable
from concord_shared.errors import ArtefactError, ConflictError, UsageError
from concord_shared.text import printable

if TYPE_CHECKING:
    from concord_server.client_nouns import Review, Standing
    from concord_shared.documents import Agreement

__all__ = ["outputs_of", "register", "show_agreement"]

group = typer.Typer(help="Agreements: which datasets may serve a study, on which terms.", no_args_is_help=True)
Id = Annotated[str, typer.Argument(metavar="AGREEMENT", help="From `concord agreement list`.")]
Cohort = Annotated[
    int | None, typer.Option("--minimum-cohort", min=1, help="No round with fewer nodes than these. Default 2.")
]
Rounds = Annotated[int | None, typer.Option("--rounds", min=1, help="The most rounds of a run. Default 1000.")]
Models = Annotated[
    list[str] | None, typer.Option("--model", metavar="NAME", help="Allow only these models; repeatable.")
]
Use = Annotated[str | None, typer.Option(help="Other terms, in words.")]
Purposes = Annotated[list[str] | None, typer.Option("--purpose", metavar="WORD", help="What for; repeatable.")]
Outputs = Annotated[
    list[str] | None,
    typer.Option("--output", metavar="release|commercial|none", help="What models may be used for; repeatable."),
]
Digest = Annotated[
    str | None, typer.Option(help="Of what you have seen: signs that and nothing else, without a question.")
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Sign what stands there, without a question.")]
SEEN_MAX = 1000


def register(app: typer.Typer) -> None:
    app.add_typer(group, name="agreement")


@group.command(
    epilog="**Example**\n\n`concord agreement request heart ward-3/heart ward-4/heart --days 180 "
    "--key keys/organisation.key`"
)
def request(
    study: Annotated[str, typer.Argument(metavar="STUDY")],
    datasets: Annotated[list[str], typer.Argument(metavar="NODE/DATASET…", help="Of one owner.")],
    minimum_cohort: Cohort = None,
    rounds: Rounds = None,
    models: Models = None,
    use: Use = None,
    purposes: Purposes = None,
    outputs: Outputs = None,
    days: Annotated[int, typer.Option(min=1, help="How long it is to hold.")] = 365,
    agreement: Annotated[str | None, typer.Option("--id", help="Its id; made up by default.")] = None,
    key: Key = None,
    organisation: OnBehalf = None,
    as_json: Json = False,
) -> None:
    """Ask an owner to open datasets to a study, on these terms."""
    from concord_server.client_nouns import request_agreement, told

    terms, signer = _terms(minimum_cohort, rounds, models, use, purposes, outputs), signing_key(key)
    with coordinator() as api:
        made = request_agreement(
            api, signer, study, datasets, terms=terms, days=days, agreement=agreement, organisation=organisation
        )
    show_record(told(made), as_json, show_agreement)


@group.command(
    epilog="**Examples**\n\n`concord agreement offer ID --key FILE` agrees as requested\n\n"
    "`concord agreement offer ID --rounds 50 --days 90 --key FILE` sets other terms\n\n"
    "`concord agreement offer ID --digest 4be1… --key FILE` in a script: what `concord agreement show` showed"
)
def offer(
    agreement: Id,
    minimum_cohort: Cohort = None,
    rounds: Rounds = None,
    models: Models = None,
    use: Use = None,
    purposes: Purposes = None,
    outputs: Outputs = None,
    days: Annotated[int | None, typer.Option(min=1, help="How long it is to hold, from now.")] = None,
    datasets: Annotated[
        list[str] | None, typer.Option("--dataset", metavar="NODE/DATASET", help="Only these; repeatable.")
    ] = None,
    digest: Digest = None,
    yes: Yes = False,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Offer what was requested: as it is, and so agreed at once, or on other terms. For the owner.

    Shows what is to be signed and asks. Where nobody can be asked, it signs what `concord agreement show` showed last.
    """
    from concord_server.client_nouns import offer_agreement, told

    terms, signer = _terms(minimum_cohort, rounds, models, use, purposes, outputs), signing_key(key)
    with coordinator() as api:
        review = _review(api.url, digest is not None or yes)
        changes: dict[str, Any] = {"terms": terms, "days": days, "datasets": datasets or ()}
        made = offer_agreement(api, signer, agreement, **changes, digest=digest, review=review)
    show_record(told(made), as_json, show_agreement)


@group.command(epilog="**Example**\n\n`concord agreement agree ID --digest 4be1… --key FILE`")
def agree(
    agreement: Id,
    digest: Digest = None,
    yes: Yes = False,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Agree to what the owner offers. For the requester.

    Shows what is to be signed and asks. Where nobody can be asked, it signs what `concord agreement show` showed last.
    """
    from concord_server.client_nouns import agree as sign
    from concord_server.client_nouns import told

    signer = signing_key(key)
    with coordinator() as api:
        made = sign(api, signer, agreement, digest, _review(api.url, digest is not None or yes))
    show_record(told(made), as_json, show_agreement)


@group.command(epilog="**Example**\n\n`concord agreement withdraw ID --reason 'the study is over' --key FILE`")
def withdraw(
    agreement: Id,
    reason: Annotated[str, typer.Option(help="For the others to read.")] = "",
    key: Key = None,
    as_json: Json = False,
) -> None:
    """End an agreement, at once and for good; runs that live by it stop. For the owner."""
    from concord_server.client_nouns import told, withdraw_agreement

    signer = signing_key(key)
    with coordinator() as api:
        show_record(told(withdraw_agreement(api, signer, agreement, reason)), as_json, show_agreement)


@group.command("list")
def list_all(
    study: Annotated[str | None, typer.Option(metavar="STUDY")] = None,
    state: Annotated[str | None, typer.Option(help="requested, offered, agreed or withdrawn.")] = None,
    as_json: Json = False,
) -> None:
    """List agreements to which your organisation is a party."""
    columns = ("agreement", "study", "requester", "owner", "state", "datasets")
    with coordinator() as api:
        show_items(api.pages("/api/v1/agreements", study=study, state=state), columns, as_json)


@group.command()
def show(agreement: Id, as_json: Json = False) -> None:
    """Show an agreement, the study that it is about and its terms, as they were signed, and by whom."""
    from concord_server.client_nouns import standing_agreement

    with coordinator() as api:
        found = standing_agreement(api, agreement)
    _remember(api.url, found.document)
    show_record(_record(found), as_json, lambda _: _write(sys.stdout, _lines(found, found.document)))


def outputs_of(given: list[str] | None) -> tuple[str, ...] | None:
    """`none` is nothing at all; None where they were not spoken of."""
    return None if not given else tuple(each for each in given if each != "none")


def _terms(
    minimum_cohort: int | None,
    rounds: int | None,
    models: list[str] | None,
    use: str | None,
    purposes: list[str] | None,
    outputs: list[str] | None,
) -> dict[str, Any]:
    """What was asked for; the rest stays as it is."""
    given = {"minimum_cohort": minimum_cohort, "rounds_max": rounds, "use": use, "outputs": outputs_of(outputs)}
    named = {"models": models, "purposes": purposes}
    return {field: value for field, value in given.items() if value is not None} | {
        field: tuple(words) for field, words in named.items() if words
    }


def _review(url: str, told_to: bool) -> "Review":
    """Shows what is to be signed, then asks; where nobody can be asked, only what was shown before may be signed.

    told_to: the command itself says that it is to be signed.
    """

    def review(found: "Standing", document: "Agreement") -> None:
        _write(sys.stderr, _lines(found, document))
        if told_to:
            return
        if _somebody_is_there():
            if not typer.confirm("Sign this?", err=True):
                raise ConflictError("nothing was signed")
        elif _seen().get(f"{url} {document.agreement}") != found.document.digest:
            raise UsageError(
                f"nobody can be asked here, and this was not shown on this machine: concord agreement show "
                f"{document.agreement} first, or confirm with --digest DIGEST. Nothing was signed"
            )

    return review


def _somebody_is_there() -> bool:
    return sys.stdin.isatty()


def _remember(url: str, document: "Agreement") -> None:
    """That this is what a person on this machine has seen of an agreement."""
    from concord_shared.files import write_atomically

    seen = _seen()
    seen.pop(f"{url} {document.agreement}", None)
    kept = [*seen.items(), (f"{url} {document.agreement}", document.digest)][-SEEN_MAX:]
    try:
        write_atomically(_seen_file(), json.dumps(dict(kept)))
    except ArtefactError as error:
        sys.stderr.write(f"warning: {error}. A script must name what it signs: --digest {document.digest}\n")


def _seen() -> dict[str, str]:
    try:
        found = json.loads(_seen_file().read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _seen_file() -> Path:
    from concord_server.client import profile_path

    return profile_path().with_name("agreements-seen.json")


def _record(found: "Standing") -> dict[str, Any]:
    said = found.document.model_dump(mode="json")
    study = {"title": found.study.title, "purpose": found.study.purpose} if found.study else None
    return said | {
        "state": found.state,
        "digest": found.document.digest,
        "about": study,
        "signed_by": dict(found.signers),
    }


def show_agreement(found: Mapping[str, Any]) -> None:
    """What an agreement says, a line each."""
    _write(sys.stdout, _terms_lines(found))


def _lines(found: "Standing", document: "Agreement") -> list[str]:
    """What `document` says, with the study that it is about, and who signed what stands so far."""
    study = found.study
    about = [f"  for: {study.title}", *_words(study.purpose)] if study else ["  which is another one by now"]
    head, owner, asked, *terms = _terms_lines(
        document.model_dump(mode="json") | {"state": found.state, "digest": document.digest}
    )
    signed = [f"  {name}, key {readable(key)}" for name, key in found.signers.items()] or ["  nobody"]
    return [head, owner, asked, *about, *terms, "  signed by" if document == found.document else "  last signed by",
            *(f"  {line}" for line in signed)]  # fmt: skip


def _terms_lines(found: Mapping[str, Any]) -> list[str]:
    terms = found["terms"]
    until = time.strftime("%Y-%m-%d", time.gmtime(terms["not_after"]))
    outputs = terms.get("outputs")
    return [
        f"{found['agreement']}: {found['state']}",
        f"  {found['owner']} opens {', '.join(found['datasets'])}",
        f"  to the study {found['study']}, as {found['requester']} asked, until {until}",
        f"  no round with fewer than {terms['minimum_cohort']} nodes; at most {terms['rounds_max']} rounds a run",
        f"  models: {', '.join(terms['models']) or 'any that the node has installed'}",
        *([f"  for: {', '.join(terms['purposes'])}"] if terms.get("purposes") else []),
        *([f"  models may be used for: {', '.join(outputs) or 'nothing'}"] if outputs is not None else []),
        *_words(terms["use"]),
        f"  digest {found['digest']}",
    ]


def _words(text: str) -> list[str]:
    return [f"    {line}" for line in text.splitlines()]


def _write(to: Any, lines: Iterable[str]) -> None:
    to.write("".join(f"{printable(line)}\n" for line in lines))
