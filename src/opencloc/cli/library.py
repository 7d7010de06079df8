"""Verbs of the photo library: index, search, embed, app."""

from __future__ import annotations

from opencloc.cli.arguments import group, named, parse, together


def index(arguments: list[str]) -> int:
    """Index the regions of photos, to be searched: opencloc index PHOTOS ... --out INDEX --model M"""
    from transformers.utils.logging import disable_progress_bar

    from opencloc.search.index import IndexConfig, format_report, run_index
    from opencloc.vesl.workers import WorkersConfig

    disable_progress_bar()
    arguments = named(arguments, "--photos", "--names")
    parsed = parse(group("Index", index=IndexConfig, where=WorkersConfig), arguments, "index")
    report = run_index(parsed.index, parsed.where)
    print(format_report(parsed.index.out, report))
    return report.exit_code


def search(arguments: list[str]) -> None:
    """Search a photo library: opencloc search INDEX [TEXT ...] [--image PHOTO [--box X0 Y0 X1 Y1]]"""
    from transformers.utils.logging import disable_progress_bar

    from opencloc.search.ask import SearchConfig, print_table, run_search, to_json, write_html

    disable_progress_bar()
    count = next((i for i, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
    texts = ["--text", *arguments[1:count]] if count > 1 else []
    first = ["--index", arguments[0]] if count else []
    config = parse(SearchConfig, together([*first, *texts, *arguments[count:]], "--text", "--minus"), "search")
    found = run_search(config)
    if config.html is not None:
        write_html(found, config.html)
        print(config.html)
    if config.json:
        print(to_json(found))
    else:
        print_table(found)


def embed(arguments: list[str]) -> None:
    """Write embeddings of images and regions as Parquet: opencloc embed SOURCE --out FILE.parquet --model M"""
    from transformers.utils.logging import disable_progress_bar

    from opencloc.errors import and_skipped
    from opencloc.search.embed import EmbedConfig, run_embed

    disable_progress_bar()
    config = parse(EmbedConfig, named(arguments, "--source"), "embed")
    report = run_embed(config)
    print(config.out)
    print(f"{report.images:,} images and {report.regions:,} regions embedded{and_skipped(report.skipped)}")


def app(arguments: list[str]) -> None:
    """Open a web page to try regions and search a library: opencloc app [INDEX] [--model M]"""
    from transformers.utils.logging import disable_progress_bar

    from opencloc.search.app import AppConfig, run_app

    disable_progress_bar()
    run_app(parse(AppConfig, named(arguments, "--index"), "app"))
