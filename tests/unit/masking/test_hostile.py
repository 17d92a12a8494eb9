"""FSA-1 against a coordinator that lies: every way that opened Flower's SecAgg+, and more, ends at a node's refusal."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from flwr.app import ConfigRecord

from concord_client.masked_step import MaskedStep
from concord_shared.errors import MaskingRefusedError, RoundAbortedError, UpdateRefusedError, UsageError
from concord_shared.masking.shamir import PRIME, SHARE_BYTES, combine, split
from concord_shared.masking.tables import TABLES, read_table
from concord_shared.messages import Offer
from unit.masking.kit import Records, World, assert_exact, play

VICTIM = "node-001"


def only(stage: str, change: Callable[[Records], None], node: str | None = VICTIM) -> Callable[..., Records]:
    """Meddles with one stage, towards one node or all."""

    def meddle(at: str, to: str, records: Records) -> Records:
        if at == stage and node in (to, None):
            change(records)
        return records

    return meddle


def flip(record: ConfigRecord, column: str, index: int) -> None:
    value = bytearray(record[column])  # type: ignore[arg-type]
    value[index] ^= 1
    record[column] = bytes(value)


def without(records: Records, table: str, place: int) -> None:
    """The table without the row of `place`."""
    record = records[f"masking.{table}"]
    if place not in record["places"]:
        return
    index = record["places"].index(place)
    record["places"] = [each for each in record["places"] if each != place]
    for column, width in TABLES[table].items():
        value = record[column]
        record[column] = value[: index * width] + value[(index + 1) * width :]


class TestEveryField:
    """Each byte column of each table that a node receives, one bit flipped in each row: refused by name."""

    @pytest.mark.parametrize(
        ("stage", "table", "column"),
        [
            ("shares", "adverts", "channel"),
            ("shares", "adverts", "mask"),
            ("shares", "adverts", "signature"),
            ("masked", "commitments", "digest"),
            ("masked", "commitments", "signature"),
            ("masked", "sealed", "shares"),
            ("open", "consents", "signature"),
        ],
    )
    def test_flipped_is_refused(self, stage: str, table: str, column: str) -> None:
        width = TABLES[table][column]
        rows = 3 if table == "sealed" else 4
        for row in range(rows):
            world = World(4)
            change = only(stage, lambda records, row=row: flip(records[f"masking.{table}"], column, row * width))  # type: ignore[misc]
            outcome = play(world, meddle=change)
            assert VICTIM in outcome.refusals, (row, "accepted")

    @pytest.mark.parametrize("name", sorted(set(Offer.__dataclass_fields__) - {"node", "stage", "applied_round"}))
    def test_a_node_that_was_told_otherwise_has_another_context(self, name: str) -> None:
        """Another model, round, attempt, plan, number of nodes … to one node only: its keys fit nobody's."""
        world = World(4)
        value: Any = getattr(world.attempt(VICTIM).offer, name)
        other = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value + "0"
        steps = world.steps()
        steps[VICTIM] = world.step(VICTIM, **{name: other})
        with pytest.raises(UpdateRefusedError, match="signature"):
            play(world, steps=steps)

    @pytest.mark.parametrize("name", ["manifest", "weight_cap"])
    def test_and_so_for_what_is_not_in_the_offer(self, name: str) -> None:
        world = World(4)
        steps = world.steps()
        steps[VICTIM] = world.step(VICTIM, **{name: "e" * 64 if name == "manifest" else 7})
        with pytest.raises(UpdateRefusedError, match="signature"):
            play(world, steps=steps)


class TestFlowersWeaknesses:
    def test_swapped_keys(self) -> None:
        """Attack D: the coordinator in the middle puts keys of its own in place of a peer's."""

        def swap(records: Records) -> None:
            record = records["masking.adverts"]
            own = X25519PrivateKey.generate().public_key().public_bytes_raw()
            record["mask"] = own + record["mask"][32:]

        outcome = play(World(4), meddle=only("shares", swap))
        assert outcome.refusals[VICTIM].check == "signature"

    def test_keys_signed_by_another_than_the_roster_names(self) -> None:
        world = World(4)
        forger = Ed25519PrivateKey.generate()
        attempt = world.attempt(VICTIM)

        def forge(records: Records) -> None:
            keys = [X25519PrivateKey.generate().public_key().public_bytes_raw() for _ in range(2)]
            advert = attempt.sign_advert(forger, *keys)
            record = records["masking.adverts"]
            for column, value in (("channel", keys[0]), ("mask", keys[1]), ("signature", advert.signature)):
                record[column] = value + record[column][TABLES["adverts"][column] :]

        assert play(world, meddle=only("shares", forge)).refusals[VICTIM].check == "signature"

    def test_one_node_as_survivor_and_as_lost(self) -> None:
        """Attack A: both secrets of one node. There is no message that asks for names: a node opens what it knows."""
        world = World(4)
        given: dict[str, Any] = {}

        def note(stage: str, node: str, records: Records) -> Records:
            if stage == "open":
                given[node] = read_table(records, "shares")
            return records

        adverts: dict[int, tuple[bytes, ...]] = {}

        def see(stage: str, node: str, records: Records) -> Records:
            if stage == "shares":
                adverts.update(read_table(records, "adverts"))
            return records

        play(world, {"masked": {VICTIM}}, meddle=see, answers=note)
        shares = {world.names.index(node) + 1: table[1][0] for node, table in given.items()}
        secret = X25519PrivateKey.from_private_bytes(combine(shares))
        assert secret.public_key().public_bytes_raw() == adverts[1][1]  # of the lost one the mask key, and no more
        for place in (0, 2, 3):  # of survivors the seed, which is not the mask key
            shares = {world.names.index(node) + 1: table[place][0] for node, table in given.items()}
            other = X25519PrivateKey.from_private_bytes(combine(shares))
            assert other.public_key().public_bytes_raw() != adverts[place][1]

    def test_two_views_of_the_survivors(self) -> None:
        """Split view: half of the nodes are told that the victim is lost. Neither view finds enough consents."""
        world = World(5)
        told = set(world.names[3:])

        def split_view(stage: str, node: str, records: Records) -> Records:
            if stage == "consent" and node in told:
                without(records, "survivors", 1)
            return records

        consents: dict[str, Any] = {}

        def note(stage: str, node: str, records: Records) -> Records:
            if stage == "consent":
                consents[node] = records
            return records

        with pytest.raises(UpdateRefusedError, match="consent of node-003"):
            play(world, meddle=split_view, answers=note)
        assert len(consents) == 4

    def test_no_second_view_reaches_the_threshold(self) -> None:
        """What the coordinator could do with the consents of two views: each is below t, and nodes count them."""
        world = World(5)
        steps = world.steps()
        play(world, steps=steps, until="masked")
        full, less = list(range(5)), [0, 2, 3, 4]
        signed: dict[int, bytes] = {}
        for place, name in enumerate(world.names):
            seen = full if place in (0, 1, 2) else less
            answer, _ = steps[name].answer("consent", {"masking.survivors": ConfigRecord({"places": seen})})
            [(_, (signature,))] = read_table(answer, "consents").items()
            signed[place] = signature
        for group, name in (((0, 1, 2), "node-000"), ((0, 1, 2, 3, 4), "node-001"), ((3, 4), "node-003")):
            table = {"places": list(group), "signature": b"".join(signed[each] for each in group)}
            with pytest.raises(MaskingRefusedError):
                steps[name].answer("open", {"masking.consents": ConfigRecord(table)})

    @pytest.mark.parametrize("stage", ["shares", "masked", "consent"])
    def test_fewer_than_the_manifest_needs(self, stage: str) -> None:
        """Attack C: n, t and m are not the coordinator's to choose."""
        table = {"shares": "adverts", "masked": "commitments", "consent": "survivors"}[stage]
        world = World(5)

        def shrink(records: Records) -> None:
            for place in (3, 4):
                without(records, table, place)
                if stage == "masked":
                    without(records, "sealed", place)

        assert play(world, meddle=only(stage, shrink, None)).refusals["node-000"].check == "too-few"

    def test_a_node_that_is_left_out_gives_nothing(self) -> None:
        outcome = play(World(5), meddle=only("consent", lambda records: without(records, "survivors", 1)))
        assert outcome.refusals[VICTIM].check == "places"

    @pytest.mark.parametrize("places", [[0, 0, 1, 2], [1, 0, 2, 3], [0, 1, 2, 200], [0, 1, 2, -1], "0123"])
    def test_lists_of_another_form(self, places: Any) -> None:
        def change(records: Records) -> None:
            records["masking.survivors"] = ConfigRecord({"places": places})

        assert play(World(4), meddle=only("consent", change)).refusals[VICTIM].check == "malformed"


class TestOnce:
    def test_a_stage_is_answered_once_and_in_order(self) -> None:
        world = World(4)
        step = world.step(VICTIM)
        step.answer("keys", {})
        with pytest.raises(MaskingRefusedError, match="not what comes next"):
            step.answer("keys", {})
        fresh = world.step("node-002")
        with pytest.raises(MaskingRefusedError, match="not what comes next"):
            fresh.answer("masked", {})
        with pytest.raises(MaskingRefusedError, match="not what comes next"):
            fresh.answer("keys", {})  # after a refusal nothing more

    def test_an_attempt_does_not_begin_twice(self) -> None:
        world = World(4)
        world.step(VICTIM).answer("keys", {})
        with pytest.raises(MaskingRefusedError, match="not newer"):
            world.step(VICTIM).answer("keys", {})

    def test_nobody_opens_a_step_again(self) -> None:
        """The coordinator opens, feigns failure and asks again without the victim, to subtract."""
        world = World(4)
        assert_exact(world, play(world))
        again = World(4, attempt_number=2, journals=world.journals)
        outcome = play(again)
        assert outcome.sums is None
        assert {error.check for error in outcome.refusals.values()} == {"replayed"}

    def test_a_rerun_with_those_who_did_not_open_fails_for_every_split(self) -> None:
        """n, c and who opened the first time: the others and all colluders together are below the threshold."""
        for nodes in range(3, 13):
            for collusion in range((nodes - 1) // 2):
                try:
                    needed = World(nodes, collusion).needed
                except UsageError:
                    continue
                for opened in range(needed.opening - collusion, nodes - collusion + 1):
                    left = nodes - collusion - opened
                    assert left + collusion < needed.opening

    def test_a_message_of_another_round_is_refused(self) -> None:
        first, second = World(4), World(4, round_number=2)
        second.keys = first.keys
        caught: dict[str, Any] = {}

        def keep(stage: str, node: str, records: Records) -> Records:
            if stage == "shares":
                caught.update(records)
            return records

        play(first, meddle=keep)
        outcome = play(second, meddle=lambda stage, node, records: dict(caught) if stage == "shares" else records)
        assert {error.check for error in outcome.refusals.values()} == {"keys"}


class TestPeers:
    def test_a_key_of_small_order(self) -> None:
        world = World(4)

        def answers(stage: str, node: str, records: Records) -> Records:
            if stage == "keys" and node == "node-003":
                advert = world.attempt(node).sign_advert(world.keys[node], bytes(32), bytes([1]) + bytes(31))
                table = {"places": [3], "channel": advert.channel, "mask": advert.mask, "signature": advert.signature}
                records["masking.adverts"] = ConfigRecord(table)
            return records

        outcome = play(world, answers=answers)
        assert outcome.sums is None
        assert "no proper one" in str(outcome.refusals["node-000"])

    def test_a_node_cannot_take_anothers_keys(self) -> None:
        world = World(4)
        seen: dict[str, Any] = {}

        def answers(stage: str, node: str, records: Records) -> Records:
            if stage == "keys":
                if node == "node-003":
                    [stolen] = read_table(seen, "adverts").values()
                    advert = world.attempt(node).sign_advert(world.keys[node], stolen[0], stolen[1])
                    table = {"places": [3], "channel": stolen[0], "mask": stolen[1], "signature": advert.signature}
                    return {"masking.adverts": ConfigRecord(table)}
                seen.update(records)
            return records

        with pytest.raises(UpdateRefusedError, match="another node's"):
            play(world, answers=answers)

    @pytest.mark.parametrize(("nodes", "liars"), [(10, 1), (10, 3), (18, 1), (40, 4)])
    def test_wrong_shares_are_found_and_named(self, nodes: int, liars: int) -> None:
        world = World(nodes)
        lying = set(world.names[:liars])

        def answers(stage: str, node: str, records: Records) -> Records:
            if stage == "open" and node in lying:
                record = records["masking.shares"]
                for row in range(len(record["places"])):
                    flip(record, "share", row * SHARE_BYTES + 20)
            return records

        outcome = play(world, answers=answers)
        assert_exact(world, outcome)
        assert outcome.collection.liars == lying

    def test_too_many_wrong_shares_open_nothing(self) -> None:
        world = World(4)

        def answers(stage: str, node: str, records: Records) -> Records:
            if stage == "open" and node in ("node-000", "node-001"):
                flip(records["masking.shares"], "share", 10 + world.names.index(node))  # not errors that cancel
            return records

        with pytest.raises(RoundAbortedError, match="cannot be taken off"):
            play(world, answers=answers)

    def test_sybils_are_not_counted(self) -> None:
        """The owner knows two of four nodes and wants three such in a sum: the others may be anybody's."""
        world = World(4)

        def step(pinned: set[str]) -> MaskedStep:
            return MaskedStep(
                world.attempt(VICTIM),
                VICTIM,
                world.keys[VICTIM],
                world.journals[VICTIM],
                lambda: world.updates[VICTIM],
                frozenset(pinned),
                minimum=3,
            )

        with pytest.raises(MaskingRefusedError, match="pinned"):
            step({"node-000"})
        assert step({"node-000", "node-002"}).answer("keys", {})


class TestShamir:
    def test_the_vector_of_the_design(self) -> None:
        secret = bytes(range(32))
        value = int.from_bytes(secret, "big")
        shares = {x: ((value + x + 2 * x * x) % PRIME).to_bytes(SHARE_BYTES, "big") for x in (1, 2, 3)}
        assert shares[1] == (value + 3).to_bytes(SHARE_BYTES, "big")
        assert shares[3] == (value + 21).to_bytes(SHARE_BYTES, "big")
        assert combine(shares) == secret
        for pair in itertools.combinations(shares, 2):
            assert combine({point: shares[point] for point in pair}) != secret

    @pytest.mark.parametrize(("count", "threshold"), [(2, 2), (5, 3), (12, 9)])
    def test_enough_tell_and_fewer_do_not(self, count: int, threshold: int) -> None:
        secret = np.random.default_rng(3).bytes(32)
        shares = split(secret, range(1, count + 1), threshold)
        for points in itertools.combinations(shares, threshold):
            assert combine({point: shares[point] for point in points}) == secret
        for points in itertools.combinations(shares, threshold - 1):
            try:
                assert combine({point: shares[point] for point in points}) != secret
            except ValueError:
                continue

    def test_what_is_no_share_is_refused(self) -> None:
        shares = split(bytes(32), [1, 2, 3], 2)
        for wrong in ({0: shares[1]}, {1: shares[1][1:]}, {1: b"\xff" * SHARE_BYTES}):
            with pytest.raises(ValueError, match=r"share|points"):
                combine({**shares, **wrong})


def test_the_same_place_twice_is_no_attempt() -> None:
    attempt = World(4).attempt(VICTIM)
    with pytest.raises(AssertionError):
        replace(attempt, identities=attempt.identities[::-1])
