"""`halfbyte sensitivity SRC OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from halfbyte.cli.text.options import JSON_OPTION
from halfbyte.cli.text.show import listen, print_json
from halfbyte.errors import CheckFailed

_SHOWN = 5


def command(
    source: Annotated[str, typer.Argument(help="Full-precision checkpoint folder, .gguf file or hub id.")],
    out: Annotated[Path, typer.Argument(help="Folder for the record; give it to --sensitivity.")],
    data: Annotated[
        list[str] | None, typer.Option(help="A text or .jsonl of chats that no evaluation uses; may be repeated.")
    ] = None,
    preset: Annotated[str, typer.Option(help="Which linears could be NF4: decoder-only, unsloth, or a TOML file.")] = "decoder-only",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda[:N].")] = "auto",
    protocol: Annotated[str | None, typer.Option(help="e.g. 'kld[assistant,given]'. Without: what fits data and model.")] = None,
    limit: Annotated[int, typer.Option(help="First so many chats or documents.")] = 16,
    window: Annotated[int, typer.Option(help="Text tokens a row.")] = 64,
    windows: Annotated[int, typer.Option(help="Rows of a document.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer that the source writes.")] = 64,
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16: faster, with noise above small costs.")] = "float32",
    batch: Annotated[int, typer.Option(help="Rows at a time.")] = 8,
    method: Annotated[str, typer.Option(help="Measure weights as this method writes them: rtn, scale or gptq; name the one that quantize gets.")] = "rtn",
    calibration: Annotated[
        str | None, typer.Option(help="Of the method: builtin, or a file of chats or texts, none of --data; gptq needs one: builtin.")
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(help="At most so many tokens of it.")] = 65_536,
    answer_tokens: Annotated[int, typer.Option(help="Longest answer that the source writes to a prompt of it (quantize: --max-new-tokens).")] = 256,
    fit: Annotated[list[str] | None, typer.Option(help="KEY=VALUE of a fit, as for quantize; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="Which calibration texts are drawn.")] = 0,
    json: JSON_OPTION = False,
) -> None:  # fmt: skip
    """Measure what each module costs in NF4, for --budget: one group at a time, a layer of weights in memory."""
    from halfbyte.evaluator.sensitivity import sensitivity

    with listen():
        record = sensitivity(
            source, out, data=data or (), preset=preset, device=device, protocol=protocol, limit=limit, window=window,
            windows=windows, max_new_tokens=max_new_tokens, dtype=dtype, batch=batch, method=method, calibration=calibration,
            calibration_tokens=calibration_tokens, answer_tokens=answer_tokens, fit=fit or (), seed=seed,
        )  # fmt: skip
    if json:
        print_json(record)
    else:
        typer.echo("\n".join(_lines(record)))
        typer.echo(f"next: halfbyte plan {source} --budget SIZE --sensitivity {out}")
    if record["self_kld"] != 0:
        raise CheckFailed(
            f"the source's KLD from itself is not 0 ({record['self_kld']:g}): the kernels are not deterministic",
            where=str(out),
            todo="use --device cpu or --dtype float32",
        )


def _lines(record: dict[str, Any]) -> list[str]:
    rows, groups = record["rows"], record["groups"]
    lines = [
        f"{len(groups)} groups by {record['weights']['method']}, {rows['n']:,} tokens of {rows['documents']} documents, {rows['protocol']}, "
        f"{record['run']['seconds']:.0f} s on {record['run']['device_name']}"
    ]
    for choice, joint in record["joint"].items():
        found = record["drift_rank_correlation"][choice]
        guess = "not defined" if found["spearman"] is None else f"{found['spearman']:.2f}"
        lines.append(
            f"{choice}: all at once {joint['kld']:.4f} nats, the sum of single ones {joint['sum']:.4f}; "
            f"rank correlation with the residual's drift {guess} (n = {found['n']})"
        )
    lines.append(f"the dearest in {next(iter(record['joint']))}:")
    for group in sorted(groups, key=lambda g: -g["costs"]["nf4-64"]["kld"])[:_SHOWN]:
        cost = group["costs"]["nf4-64"]
        spread = "" if cost["standard_error"] is None else f" (s.e. {cost['standard_error']:.2g})"
        lines.append(
            f"  {cost['kld']:.2e} nats{spread}, in NF4-32 {group['costs']['nf4-32']['kld']:.2e}: {group['name']}"
        )
    return lines
