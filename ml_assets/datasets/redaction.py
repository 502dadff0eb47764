"""Personal data replaced by its kind: `write to [EMAIL]`.

Patterns, with a checksum where the kind has one (Luhn for credit cards, mod 97 for IBANs), so that ordinary
numbers ("set a timer for 45 minutes", "order 4711-2024") stay. Names and addresses take a language model:
`redact: presidio` uses Microsoft Presidio where it is installed.
"""

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Sequence

Redactor = Callable[[str], tuple[str, Counter[str]]]
"""Replaces personal data in a text; also says how many of each kind."""


class RedactionUnavailable(ValueError):
    """The redaction that the YAML asks for is not installed."""


def redactor(kinds: Sequence[str] | str) -> Redactor:
    """A redactor of the kinds that `dataset.redact` lists, or Presidio's.

    Raises RedactionUnavailable when Presidio is not installed.
    """
    if isinstance(kinds, str):
        return _presidio()
    rules = [rule for rule in RULES if rule[0] in kinds]

    def redact(text: str) -> tuple[str, Counter[str]]:
        found: Counter[str] = Counter()
        if not SUSPICIOUS.search(text):
            return text, found
        for kind, pattern, is_one in rules:

            def replace(match: re.Match[str], kind: str = kind, is_one: Callable = is_one) -> str:
                keep = match.groupdict().get("keep") or ""
                rest = match[0][len(keep) :]
                # a number may run into the next one ("4111 1111 1111 1111 12/26"): longest valid part
                ends = [found.end() for found in re.finditer(r"\w(?!\w)|$", rest)]
                end = next((end for end in reversed(ends) if is_one(rest[:end])), None)
                if end is None:
                    return match[0]
                found[kind] += 1
                return f"{keep}[{kind.upper()}]{rest[end:]}"

            text = pattern.sub(replace, text)
        return text, found

    return redact


def _always(text: str) -> bool:
    return True


def _card(text: str) -> bool:
    """A card network's prefix and length, and the check digit of ISO/IEC 7812-1 (Luhn)."""
    number = re.sub(r"\D", "", text)
    networks = (
        r"4\d{12}|4\d{15}|4\d{18}|5[1-5]\d{14}|2[2-7]\d{14}|3[47]\d{13}|3(?:0[0-5]|[68]\d)\d{11}|35\d{14}"
        r"|6(?:011|4[4-9]\d|5\d\d)\d{12}|62\d{14,17}|(?:50|5[6-9]|6[0-9])\d{11,17}"
    )
    digits = [int(char) for char in number]
    doubled = [digit * 2 - 9 if digit > 4 else digit * 2 for digit in digits[-2::-2]]
    return bool(re.fullmatch(networks, number)) and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _iban(text: str) -> bool:
    """ISO 13616: the first four characters moved to the end, letters as numbers 10 to 35, modulo 97 is 1."""
    compact = re.sub(r"[ -]", "", text)
    if not 15 <= len(compact) <= 34:
        return False
    return int("".join(str(int(char, 36)) for char in compact[4:] + compact[:4])) % 97 == 1


def _ip_address(text: str) -> bool:
    if "." not in text and not any(char.isdigit() for char in text):
        return False  # `a::b` is an address to a parser, and a namespace to people
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _phone(text: str) -> bool:
    """Seven digits after a word such as 'call', else 8 to 15 (ITU-T E.164)."""
    return 7 <= sum(char.isdigit() for char in text) <= 15


def _compile(text: str, flags: re.RegexFlag = re.NOFLAG) -> re.Pattern[str]:
    return re.compile(text, re.VERBOSE | flags)


RULES: list[tuple[str, re.Pattern[str], Callable[[str], bool]]] = [
    (
        "api_key",
        _compile(
            r"""-----BEGIN[ ][A-Z ]*PRIVATE[ ]KEY-----.*?(?:-----END[ ][A-Z ]*PRIVATE[ ]KEY-----|\Z)
            | (?<![\w-])(?:
                  sk-[A-Za-z0-9_-]{20,} | (?:sk|pk|rk)_(?:live|test)_[A-Za-z0-9]{16,}
                | (?:AKIA|ASIA)[A-Z0-9]{16} | AIza[A-Za-z0-9_-]{35}
                | gh[pousr]_[A-Za-z0-9]{36,} | github_pat_\w{22,} | glpat-[A-Za-z0-9_-]{20,}
                | xox[abeoprs]-[A-Za-z0-9-]{10,} | hf_[A-Za-z0-9]{30,} | npm_[A-Za-z0-9]{36}
                | pypi-[A-Za-z0-9_-]{50,} | SG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}
                | eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{5,}
              )(?![\w-])""",
            re.DOTALL,
        ),
        _always,
    ),
    (
        "api_key",  # a secret that a word announces: password=..., Bearer ...
        _compile(
            r"""(?P<keep>
                  \b(?:api[ _-]?key|access[ _-]?token|auth[ _-]?token|secret(?:[ _-]key)?|client[ _-]secret
                  |password|passwd|passwort|pwd)["']?\s*[:=]\s*["']? | \bbearer\s+ )
                (?=[^\s"',;\d]{0,256}+\d)(?=[^\s"',;]*[A-Za-z])[^\s"',;]{8,}""",
            re.IGNORECASE,
        ),
        _always,
    ),
    (
        "email",
        _compile(
            r"(?<![\w.+-])[\w.!\#$%&'*+/=?^`{|}~-]{1,254}@"
            r"(?:\w(?:[\w-]{0,61}\w)?\.){1,126}[^\W\d_]{2,63}(?![\w-])"
        ),
        _always,
    ),
    (
        "iban",
        _compile(r"(?<!\w)[A-Z]{2}\d{2}(?:[ -]?[A-Z0-9]{4}){2,7}(?:[ -]?[A-Z0-9]{1,3})?(?!\w)"),
        _iban,
    ),
    (
        "credit_card",
        _compile(
            r"""(?<![\w.])(?:
                  \d{4}[ -]\d{4}[ -]\d{4}[ -]\d{4}(?:[ -]\d{1,3})? | \d{4}[ -]\d{6}[ -]\d{4,5} | \d{13,19}
                )(?!\w)"""
        ),
        _card,
    ),
    (
        "ip_address",
        _compile(
            r"""(?<![\w.:])(?<!version[ ])(?:
                  \d{1,3}(?:\.\d{1,3}){3}(?!\w|\.\d)
                | (?:[0-9A-Fa-f]{0,4}:){2,7}(?:[0-9A-Fa-f]{0,4}|\d{1,3}(?:\.\d{1,3}){3})(?![\w:]|\.\d)
                )"""
        ),
        _ip_address,
    ),
    (
        "phone",
        _compile(
            r"""(?<![\w+.,/:€$£#-]) (?!\d{1,4}([-/.])\d{1,2}\1\d{1,4}\b)  # not a date
            (?:
                (?:\+|00)[1-9]\d{0,2}+ (?:[ .\-/]? (?:\(0?\d{0,5}\)|\d{1,9}+)){1,6}   # +49 30 1234567
              | (?:1[ .-])? (?:\(\d{3}\)[ ]?|\d{3}[ .-]) \d{3}[ .-]\d{4}           # (555) 123-4567
              | 0[1-9](?:[ .]\d{2}){4}                                             # 01 23 45 67 89
              | (?:\(0\d{2,5}\)|0\d{2,5})[ ]?[ /-][ ]?\d{2,8}(?:[ /-]\d{2,8}){0,3}     # 030/1234567
              | 0[1-9]\d{8,10}                                                     # 01711234567
            ) (?![\w%°€$£]|[.,:/-]\d)"""
        ),
        lambda text: _phone(text) and sum(char.isdigit() for char in text) > 7,
    ),
    (
        "phone",  # a local number that a word announces
        _compile(
            r"""(?P<keep>\b(?:phone|telephone|tel|call|dial|ring|mobile|cell|fax|text|whatsapp|number|telefon
                  |handy|mobil|rufnummer|nummer)\b[.:]?\s*(?:(?:me|us|at|on|is|ist|unter)\s+){0,3})
                \d{3}[ -]\d{4}(?!\w|[.,:/-]\d)""",
            re.IGNORECASE,
        ),
        _phone,
    ),
]
"""Kind, pattern and check, in the order of application: a card number looks like a phone number.

Texts come from anyone, and a pattern that is tried holds up all threads: where repetitions meet, they are
bounded or possessive (`++`), so that the time grows with the length of the text only."""


SUSPICIOUS = re.compile(r"[\d@]|-----|[\w-]{13}")
"""What every text has that a rule finds something in: a digit, an @, the beginning of a private key, or a
word as long as the shortest token. Most texts have none, and the rules take ten times as long to find out."""


def _presidio() -> Redactor:
    try:
        from presidio_analyzer import AnalyzerEngine  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise RedactionUnavailable(
            "dataset.redact: 'presidio' needs the package presidio-analyzer and a spaCy model, which are not "
            "installed; install them, or list kinds to redact by pattern (email, phone, credit_card, iban, "
            "ip_address, api_key)"
        ) from error
    try:
        engine = AnalyzerEngine()
    except (Exception, SystemExit) as error:  # spaCy ends the process when its model can't be downloaded
        raise RedactionUnavailable(f"dataset.redact: presidio cannot start: {error}") from error

    def redact(text: str) -> tuple[str, Counter[str]]:
        found: Counter[str] = Counter()
        taken = len(text)
        spans = engine.analyze(text=text, language="en")
        # from the end, so that the places before stay; of overlapping spans the one that ends last
        for span in sorted(spans, key=lambda span: (span.end, span.score), reverse=True):
            if span.end <= taken:
                taken = span.start
                found[span.entity_type.lower()] += 1
                text = f"{text[: span.start]}[{span.entity_type}]{text[span.end :]}"
        return text, found

    return redact
