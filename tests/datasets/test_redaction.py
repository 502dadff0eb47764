import random
import string
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml_assets.datasets.redaction import RULES, SUSPICIOUS, RedactionUnavailable, redactor
from ml_assets.spec import CustomizationSpec, DatasetSpec

KINDS = DatasetSpec().redact
PER_KIND = 84  # of six kinds: 504 planted items


def luhn(prefix: str, length: int, rng: random.Random) -> str:
    """A card number: Luhn's digit found by trying, not by the code under test."""
    body = prefix + "".join(rng.choices(string.digits, k=length - 1 - len(prefix)))
    for last in string.digits:
        number = body + last
        total = 0
        for position, digit in enumerate(map(int, reversed(number))):
            total += sum(divmod(digit * 2, 10)) if position % 2 else digit
        if total % 10 == 0:
            return number
    raise AssertionError


def iban(country: str, length: int, letters: int, rng: random.Random) -> str:
    body = "".join(rng.choices(string.ascii_uppercase, k=letters))
    body += "".join(rng.choices(string.digits, k=length - 4 - letters))
    numeric = "".join(str(int(char, 36)) for char in body + country + "00")
    return f"{country}{98 - int(numeric) % 97:02d}{body}"


def groups(text: str, size: int, separator: str) -> str:
    return separator.join(text[i : i + size] for i in range(0, len(text), size))


def planted(rng: random.Random) -> list[tuple[str, str]]:
    """Personal data as it is written, with its kind: made here from the formats' definitions."""

    def digits(count: int) -> str:
        return rng.choice("23456789") + "".join(rng.choices(string.digits, k=count - 1))

    def token(count: int) -> str:
        return "".join(rng.choices(string.ascii_letters + string.digits, k=count))

    def capitals(count: int) -> str:
        return "".join(rng.choices(string.ascii_uppercase, k=count))

    names = ["anna", "Bob.Miller", "c_d", "müller", "x+tag", "o'neil", "j-p.k9"]
    hosts = ["example.com", "mail.firma.de", "uni-köln.de", "a.b.co.uk", "192-168.example.org"]
    items: list[tuple[str, str]] = []
    for number in range(PER_KIND):
        items.append(("email", f"{rng.choice(names)}{rng.choice(['', number])}@{rng.choice(hosts)}"))
        area = digits(3)
        phones = [
            f"+49 30 {digits(7)}", f"+49 (0)171 {digits(7)}", f"+1 ({area}) {digits(3)}-{digits(4)}",
            f"+44 20 {digits(4)} {digits(4)}", f"+{rng.choice(['33', '39', '351'])}{digits(9)}",
            f"0049 171 {digits(7)}", f"({area}) {digits(3)}-{digits(4)}", f"{area}-{digits(3)}-{digits(4)}",
            f"{area}.{digits(3)}.{digits(4)}", f"1-{area}-{digits(3)}-{digits(4)}", f"030/{digits(7)}",
            f"0171 {digits(7)}", f"0171-{digits(8)}", f"020 {digits(4)} {digits(4)}",
            f"089 {digits(3)} {digits(4)}",
            f"0{digits(10)}", f"01 {digits(2)} {digits(2)} {digits(2)} {digits(2)}", f"(030) {digits(6)}",
        ]  # fmt: skip
        items.append(("phone", phones[number % len(phones)]))
        cards = [
            luhn("4", 16, rng), groups(luhn("4", 16, rng), 4, " "), groups(luhn("52", 16, rng), 4, "-"),
            luhn("37", 15, rng), luhn("6011", 16, rng), luhn("36", 14, rng), luhn("3530", 16, rng),
        ]  # fmt: skip
        amex = luhn("34", 15, rng)
        cards += [f"{amex[:4]} {amex[4:10]} {amex[10:]}", luhn("62", 17, rng), luhn("2221", 16, rng)]
        items.append(("credit_card", cards[number % len(cards)]))
        country, length, letters = rng.choice(
            [
                ("DE", 22, 0),
                ("GB", 22, 4),
                ("FR", 27, 0),
                ("NL", 18, 4),
                ("CH", 21, 0),
                ("NO", 15, 0),
                ("MT", 31, 4),
            ]
        )
        account = iban(country, length, letters, rng)
        items.append(("iban", account if number % 2 else groups(account, 4, " ")))
        addresses = [
            ".".join(str(rng.randrange(256)) for _ in range(4)),
            ":".join(f"{rng.randrange(65536):x}" for _ in range(8)),
            f"fe80::{rng.randrange(1, 65536):x}:{rng.randrange(10)}",
            f"2001:db8::{rng.randrange(10)}",
            f"::ffff:10.0.{rng.randrange(256)}.{rng.randrange(256)}",
        ]
        items.append(("ip_address", addresses[number % len(addresses)]))
        keys = [
            f"sk-proj-{token(40)}", f"sk-{token(48)}", f"AKIA{capitals(16)}", f"ghp_{token(36)}",
            f"github_pat_{token(40)}", f"xoxb-{digits(11)}-{token(24)}", f"AIza{token(35)}",
            f"hf_{token(34)}", f"glpat-{token(20)}", f"sk_live_{token(24)}", f"npm_{token(36)}",
            f"eyJ{token(20)}.eyJ{token(30)}.{token(43)}", f"SG.{token(22)}.{token(43)}", f"pypi-{token(60)}",
            f"-----BEGIN RSA PRIVATE KEY-----\n{token(64)}\n{token(64)}\n-----END RSA PRIVATE KEY-----",
        ]  # fmt: skip
        items.append(("api_key", keys[number % len(keys)]))
    return items


CARRIERS = [
    "{}", "my data: {}", "please use {} for this.", "({})", "Bitte an {} schicken, danke!", "{}, and thanks",
    '{{"value":"{}"}}', "is {} right?", "use {} or 12 others", "first line\n{}\nlast line",
]  # fmt: skip


def test_planted_personal_data_is_found():
    rng = random.Random(5)
    redact = redactor(KINDS)
    items = planted(rng)
    assert len(items) >= 500
    missed: list[str] = []
    for number, (kind, item) in enumerate(items):
        text = CARRIERS[number % len(CARRIERS)].format(item)
        clean, found = redact(text)
        # nothing of it left, what stood around it kept, and called by its name
        if clean != text.replace(item, f"[{kind.upper()}]") or dict(found) != {kind: 1}:
            missed.append(f"{kind}: {text!r} -> {clean!r}")
    assert len(missed) <= len(items) // 100, "\n".join(missed)


PIECES = [
    "-----BEGIN ", "PRIVATE KEY", "-----END ", "sk-", "rk_live_", "AKIA", "eyJ", ".", "xoxb-", "hf_", "SG.",
    "password", "bearer ", ":", "=", " ", "@", "a::b", "Z", "ä", "-", "_", "DE", "tel ", "call me at ",
    "\u0661", "7", "fe80", "example.com",
]  # fmt: skip


@given(st.lists(st.sampled_from(PIECES) | st.text("abcDEF0-_./", max_size=12), max_size=8).map("".join))
def test_no_rule_finds_anything_in_a_text_that_is_not_looked_at(text: str):
    if not SUSPICIOUS.search(text):
        assert not [m[0] for _, pattern, is_one in RULES for m in pattern.finditer(text) if is_one(m[0])]


def test_ordinary_text_is_not_looked_at():
    assert not SUSPICIOUS.search('turn off the lamp {"intent":"TurnOff","name":"desk lamp","area":"office"}')


CLEAN = """
set a timer for 45 minutes
turn the kitchen lights to 75%
set the temperature to 21.5 degrees
remind me at 10:30 and at 18:45:30
stell die Lautstärke im Bad auf 10%
order 4711-2024 was shipped on 2024-11-23
invoice no. 20241123-0042 over 1,250.00 EUR
the meeting is on 01/02/2024 at 9:00
vom 01.02.2024 bis 15.03.2025 geschlossen
on 01-02-2024 10:30 we start
1990-2000 were ten years
python 3.11.4 and torch 2.13.0 work
version 1.2.3.4 is out
chapter 3.2.1, page 114
call me at 5
call 3 people and text 12 others
dial 112 or 911 in an emergency
ISBN 978-3-16-148410-0 is a book
the square root of 1764 is 42
1234567890123 bytes were read
timestamp 1732400000000
5,000,000 people live there
3.14159265358979
his score was 120-98 against 110-99
room 0815 on floor 3
add 2 l of milk and 500 g of flour
std::vector<int> a; foo::bar(baz);
the ratio is 16:9 and 4:3
MAC 00:1A:2B:3C:4D:5E stays
a::b::c
@alice and #topic and a@b
mail me @ home
£15.8m for 600,000 shares at $141.50
password reset
forgot my password: how do I change it?
the api key is missing
sk-learn and sk-image are libraries
2 + 2 = 4; 10 - 3 = 7
123-45
from 100 000 to 250 000
DE12 is a motorway exit and FR4 a circuit board
4111 1111 1111 1112 has a wrong check digit
GB82 WEST 1234 5698 7654 33 has a wrong checksum
999.999.999.999 is no address
64-bit and 32-bit, x86_64
1e-5 and 2.5e+10
uuid 123e4567-e89b-12d3-a456-426614174000
sha 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
12 34 56 78
the years 2019 2020 2021 2022
{"intent":"SetVolume","area":"Bad","volume_level":10}
{"intent":"StartTimer","hours":2,"minutes":30,"name":"pizza"}
""".strip().splitlines()


def test_ordinary_text_stays():
    redact = redactor(KINDS)
    for line in CLEAN:
        assert redact(line) == (line, {}), line


def test_ordinary_commands_stay_in_bulk():
    redact = redactor(KINDS)
    for number in range(5000):
        text = (
            f"timer {number} for {number % 97} minutes and {number * 7 % 60} seconds, volume {number % 101}%"
        )
        assert redact(text)[0] == text


def test_only_the_kinds_that_are_listed():
    text = "a@b.com or +49 30 1234567"
    assert redactor(["phone"])(text)[0] == "a@b.com or [PHONE]"
    assert redactor([])(text) == (text, {})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("card 4111 1111 1111 1111 12/26", "card [CREDIT_CARD] 12/26"),
        ("order 12 4111 1111 1111 1111", "order 12 [CREDIT_CARD]"),
        ("DE89 3704 0044 0532 0130 00 AND MORE", "[IBAN] AND MORE"),
        ("password: hunter2secret please", "password: [API_KEY] please"),
        ("Authorization: Bearer abc123def456", "Authorization: Bearer [API_KEY]"),
        ("call me at 555-1234", "call me at [PHONE]"),
        ("two: a@b.com, c@d.org.", "two: [EMAIL], [EMAIL]."),
        ("http://192.168.0.1:8080/x", "http://[IP_ADDRESS]:8080/x"),
    ],
)
def test_what_stands_beside_stays(text, expected):
    assert redactor(KINDS)(text)[0] == expected
    assert redactor(KINDS)(expected)[0] == expected, "what is redacted stays as it is"


HOSTILE = [
    " +1" + "2" * 60, "+1 2 3 4 5 6 7 ", " +12(0)3", "2", "012-34 ", "a", "a=", "!", "a@b.", "a@a-", "a.",
    "-", "F:", "255.255.", "AB12 ", "1234 ", "pwd=", "pwd= ", "bearer ", "tel me  ", " ", "sk-a",
    "eyJaaaaaaaaaa.", "-----BEGIN PRIVATE KEY-----", "-----BEGIN PRIVATE KEY-----\n-----END ", "QUJD/+",
]  # fmt: skip


@pytest.mark.parametrize("part", HOSTILE)
def test_no_text_holds_the_interpreter(part):
    """The time of the thread, so that other programs don't count: 0.1 s where backtracking is bounded."""
    text = "a@" + (part * 32_768)[:32_765]
    for kind in KINDS:
        redact, begun = redactor([kind]), time.thread_time()
        redact(text + "é")
        assert time.thread_time() - begun < 0.8, kind


def test_a_private_key_without_its_end_is_one():
    key = "-----BEGIN RSA PRIVATE KEY-----\n" + "MIIEpAIBAAKCAQEA7\n" * 40
    assert redactor(KINDS)(f"use {key}") == ("use [API_KEY]", {"api_key": 1})


def test_presidio_that_is_not_installed_is_a_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    with pytest.raises(RedactionUnavailable, match="'presidio' needs the package presidio-analyzer"):
        redactor("presidio")


def test_the_yaml_can_ask_for_presidio_or_kinds():
    assert DatasetSpec(redact="presidio").redact == "presidio"
    assert (
        "api_key" in CustomizationSpec.model_fields["dataset"].get_default(call_default_factory=True).redact
    )
