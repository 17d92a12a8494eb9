"""A dataset's card as Croissant 1.0 JSON-LD (https://docs.mlcommons.org/croissant), with its terms as an ODRL offer.

The data cannot be downloaded, and it says so: it has no `distribution` and no record sets, which would need one.
Columns stand as schema.org's `variableMeasured`.
"""

import json
from datetime import UTC, datetime
from typing import Any

from concord_shared.cards import most_rows, rows_text
from concord_shared.documents import CardColumn, DatasetCard, DataTerms, Quality

__all__ = ["croissant_of", "croissant_text"]

PROFILE = "http://mlcommons.org/croissant/1.0"
OWN = "urn:concord:terms:1:"
"""Left operands that ODRL has no word for."""
ACCESS = (
    "The data stay with their owner and cannot be downloaded. They serve a study by an agreement with {owner}, whose "
    "node runs approved plans on them: concord dataset request STUDY {name}"
)
CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
    "cc": "http://creativecommons.org/ns#",
    "odrl": "http://www.w3.org/ns/odrl/2/",
    "xsd": "http://www.w3.org/2001/XMLSchema#",
}


def croissant_of(card: DatasetCard) -> dict[str, Any]:
    """Valid for mlcroissant; says nothing that the card does not say."""
    name = f"{card.node}/{card.dataset}"
    organisation = {"@type": "sc:Organization", "name": card.organisation}
    found: dict[str, Any] = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": PROFILE,
        "name": f"{card.node}-{card.dataset}",
        "alternateName": card.title,
        "description": card.description or card.title,
        "identifier": f"sha256:{card.dataset_version}",
        "version": "1.0.0",
        "url": f"urn:concord:dataset:{card.node}:{card.dataset}",
        "citeAs": f"{card.organisation}: {name}",
        "datePublished": _moment(card.issued_at),
        "license": _licence(card.licence),
        "keywords": list(card.keywords),
        "inLanguage": list(card.languages),
        "creator": organisation,
        "publisher": organisation,
        "isAccessibleForFree": False,
        "conditionsOfAccess": ACCESS.format(owner=card.organisation, name=name),
        "size": f"{rows_text(card)} rows",
        "additionalProperty": [_rows(card), *(_figures(card.quality) if card.quality else [])],
        "variableMeasured": _variables(card),
    }
    if card.terms is not None:
        found["usageInfo"] = _policy(name, card.organisation, card.terms)
    return {key: item for key, item in found.items() if item not in ("", [])}


def croissant_text(card: DatasetCard) -> str:
    """The same as JSON that may stand in a page: no `<`, `>` or `&`, whatever its owner wrote."""
    text = json.dumps(croissant_of(card), ensure_ascii=False, indent=1)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def _licence(text: str) -> str:
    """One identifier of the SPDX list by its address, anything else as it stands."""
    single = text and " " not in text and "LicenseRef-" not in text
    return f"https://spdx.org/licenses/{text}" if single else text or "LicenseRef-by-agreement"


def _rows(card: DatasetCard) -> dict[str, Any]:
    return _property("rows", rows_text(card)) | {"maxValue": most_rows(card), "unitText": card.input}


def _variables(card: DatasetCard) -> list[dict[str, Any]]:
    details = {column.name: column for column in card.details}
    return [_variable(details.get(name, CardColumn(name=name))) for name in card.columns]


def _variable(column: CardColumn) -> dict[str, Any]:
    found: dict[str, Any] = {
        "@type": "sc:PropertyValue",
        "name": column.name,
        "description": column.description,
        "measurementTechnique": column.kind,
        "unitText": column.unit,
        "minValue": column.range[0] if column.range else "",
        "maxValue": column.range[1] if column.range else "",
        "valueReference": list(column.categories),
    }
    return {key: item for key, item in found.items() if item not in ("", [])}


def _figures(quality: Quality) -> list[dict[str, Any]]:
    shares = {f"missing in {name}": share for name, share in quality.missing.items()} | {
        "repeated rows": quality.duplicates,
        "largest class": quality.largest_class,
        "smallest class": quality.smallest_class,
        "suspected wrong labels": quality.suspect_labels,
    }
    return [_property(name, share) for name, share in shares.items() if share]


def _property(name: str, value: str) -> dict[str, Any]:
    return {"@type": "sc:PropertyValue", "name": name, "value": value}


def _policy(name: str, organisation: str, terms: DataTerms) -> dict[str, Any]:
    constraints = []
    if terms.purposes:
        constraints.append(_constraint("odrl:purpose", "odrl:isAnyOf", list(terms.purposes)))
    if terms.who:
        constraints.append(_constraint("odrl:recipient", "odrl:isAnyOf", list(terms.who)))
    if terms.not_after:
        end = {"@type": "xsd:dateTime", "@value": _moment(terms.not_after)}
        constraints.append(_constraint("odrl:dateTime", "odrl:lteq", end))
    if terms.minimum_cohort:
        constraints.append(_constraint(f"{OWN}minimum-cohort", "odrl:gteq", terms.minimum_cohort))
    if terms.epsilon:
        constraints.append(_constraint(f"{OWN}epsilon", "odrl:lteq", {"@type": "xsd:decimal", "@value": terms.epsilon}))
    policy: dict[str, Any] = {
        "@type": "odrl:Offer",
        "@id": f"urn:concord:offer:{name.replace('/', ':')}",
        "odrl:profile": {"@id": f"{OWN}profile"},
        "odrl:permission": [
            {
                "@type": "odrl:Permission",
                "odrl:target": f"urn:concord:dataset:{name.replace('/', ':')}",
                "odrl:assigner": organisation,
                "odrl:action": {"@id": "odrl:use"},
                "odrl:constraint": constraints,
            }
        ],
    }
    if terms.outputs is not None:
        actions = {"release": "odrl:distribute", "commercial": "cc:CommercialUse"}
        forbidden = [action for output, action in actions.items() if output not in terms.outputs]
        policy["odrl:prohibition"] = [
            {"@type": "odrl:Prohibition", "odrl:target": f"{OWN}trained-model", "odrl:action": {"@id": action}}
            for action in forbidden
        ]
    return policy


def _constraint(left: str, operator: str, right: Any) -> dict[str, Any]:
    return {
        "@type": "odrl:Constraint",
        "odrl:leftOperand": {"@id": left},
        "odrl:operator": {"@id": operator},
        "odrl:rightOperand": right,
    }


def _moment(at: int) -> str:
    return datetime.fromtimestamp(min(at, 253_402_300_799), UTC).isoformat()
