"""``python -m monitoring [--docs URL]``: writes the files in configs/ and docs/ that are made."""

import argparse

from monitoring.documents import DOCS, ROOT, documents


def main() -> None:
    """Write all files, and say which."""
    parser = argparse.ArgumentParser(prog="python -m monitoring", description=__doc__)
    parser.add_argument(
        "--docs", default=DOCS, help="where docs/ is read: runbooks are linked there"
    )
    for name, text in documents(parser.parse_args().docs.rstrip("/")).items():
        (ROOT / name).write_text(text, encoding="utf-8")
        print(name)


if __name__ == "__main__":
    main()
