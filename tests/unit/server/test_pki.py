"""Certificates that the coordinator makes: who signs what, for whom, for how long."""

import datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from concord_server import pki
from concord_server.settings import Home
from concord_shared.certificates import membership_key, read_certificate, root_fingerprint, spiffe_of
from concord_shared.errors import ArtefactError, DocumentRefusedError, UsageError
from concord_shared.files import write_atomically
from concord_shared.signing import fingerprint, new_identity_key, write_private_key

NOW = datetime.datetime(2026, 6, 1, 12, tzinfo=datetime.UTC)
DAY = datetime.timedelta(days=1)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = Home(tmp_path / "c")
    for directory in made.directories:
        directory.mkdir(mode=0o700)
    made.settings_file.write_text('federation = "hearts"\npublic_host = "fl.example.org"\nsans = ["10.0.0.1", "::1"]\n')
    root_key, root_pem = pki.make_root("hearts", NOW)
    write_private_key(made.root_key, root_key)
    write_atomically(made.root_certificate, root_pem)
    write_private_key(made.coordinator_key, new_identity_key())
    pki.renew_membership(made, made.root_key, NOW)
    return made


def _key() -> ec.EllipticCurvePublicKey:
    return ec.generate_private_key(ec.SECP256R1()).public_key()


def test_the_membership_key_is_the_roots_for_at_most_90_days(home: Home) -> None:
    authority = pki.Authority.open(home, NOW)
    key = membership_key(authority.root_pem, authority.membership_pem, authority.root_fingerprint, NOW)
    assert fingerprint(key) == fingerprint(authority.key.public_key())
    certificate = read_certificate(authority.membership_pem)
    assert certificate.not_valid_after_utc - certificate.not_valid_before_utc <= 90 * DAY
    assert certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0


def test_a_leaf_never_outlives_its_signer(home: Home) -> None:
    authority = pki.Authority.open(home, NOW)
    leaf = authority.node("hospital-a", "ward-1", _key(), 30, NOW + 80 * DAY)
    assert leaf.not_after == read_certificate(authority.membership_pem).not_valid_after_utc


def test_the_servers_certificate_names_every_host(home: Home) -> None:
    names = read_certificate(home.server_certificate.read_text()).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert names.value.get_values_for_type(x509.DNSName) == ["fl.example.org"]
    assert [str(each) for each in names.value.get_values_for_type(x509.IPAddress)] == ["10.0.0.1", "::1", "127.0.0.1"]


def test_the_worker_is_a_client_of_the_coordinator(home: Home) -> None:
    certificate = read_certificate(home.worker_certificate.read_text())
    assert spiffe_of(certificate) == "spiffe://hearts/coordinator/worker"
    uses = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(uses) == [x509.ExtendedKeyUsageOID.CLIENT_AUTH]


def test_own_certificates_are_renewed_in_time_and_when_names_change(home: Home) -> None:
    before = home.server_certificate.read_text()
    assert not pki.renew_own(home, NOW + 30 * DAY)
    assert home.server_certificate.read_text() == before
    assert pki.renew_own(home, NOW + 45 * DAY)
    assert home.server_certificate.read_text() != before
    home.settings_file.write_text('federation = "hearts"\npublic_host = "other.example.org"\n')
    assert pki.renew_own(Home(home.path), NOW + 46 * DAY)


def test_an_ended_membership_key_names_the_command(home: Home) -> None:
    with pytest.raises(ArtefactError, match="concord server renew-membership"):
        pki.Authority.open(home, NOW + 91 * DAY)
    pki.renew_membership(home, home.root_key, NOW + 91 * DAY)
    pki.Authority.open(home, NOW + 91 * DAY)


def test_a_key_that_is_not_the_certificates_is_refused(home: Home) -> None:
    home.membership_key.unlink()
    write_private_key(home.membership_key, ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(ArtefactError, match="is not the key of"):
        pki.Authority.open(home, NOW)


def test_renewing_the_membership_keeps_the_root(home: Home) -> None:
    before = pki.Authority.open(home, NOW)
    leaf = read_certificate(before.node("hospital-a", "ward-1", _key(), 30, NOW).chain)
    after = pki.renew_membership(home, home.root_key, NOW + DAY)
    assert after.root_fingerprint == before.root_fingerprint
    leaf.verify_directly_issued_by(read_certificate(before.membership_pem))  # what was issued holds on


@pytest.mark.parametrize("host", ["a b", "", "-x.example", "x" * 300, "exa_mple", "http://x"])
def test_a_name_that_is_no_host_is_refused(home: Home, host: str) -> None:
    with pytest.raises(UsageError):
        pki.Authority.open(home, NOW).server([host], _key(), NOW)


@pytest.mark.parametrize(
    "pem", ["", "nonsense", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----"]
)
def test_what_is_no_request_is_refused(pem: str) -> None:
    with pytest.raises(DocumentRefusedError):
        pki.read_request(pem)


def test_the_fingerprint_is_the_root_keys(home: Home) -> None:
    authority = pki.Authority.open(home, NOW)
    assert authority.root_fingerprint == root_fingerprint(read_certificate(home.root_certificate.read_text()))
