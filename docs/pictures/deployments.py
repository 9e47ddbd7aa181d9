"""Draws the paper's two deployments as SVG files beside this script.

Sixteen GPUs in two nodes, a model of 4 layers with 16 experts each. One expert is marked in
both pictures, by colour and by its outline. Run: `python docs/pictures/deployments.py`.
"""

from pathlib import Path

HERE = Path(__file__).parent
NUM_EXPERTS, NUM_LAYERS, GPUS_PER_NODE = 16, 4, 8
MARKED = 5  # the expert to follow
OWNER = 2  # the GPU whose token is drawn in the second picture
SECOND = 12  # the token's other expert

WIDTH, LEFT, GPU, GAP = 570, 94, 51, 6
PITCH = GPU + GAP
# Okabe and Ito's colours, which stay apart for colour-blind readers.
BLUE, SKY, ORANGE, INK, PAPER, LINE = (
    *("#0072b2", "#56b4e9", "#e69f00"),
    *("#1b1f24", "#fbfbf8", "#5f6872"),
)
SOFT, NODE = "#d3e9f7", "#f0f0ea"


def main() -> None:
    """Write both pictures."""
    pictures = {"tp8-pp2.svg": tensor_and_pipeline(), "ep16.svg": expert_parallel()}
    for name, text in pictures.items():
        (HERE / name).write_text(text, encoding="utf-8")


def gpu_x(gpu: int) -> int:
    """The left edge of a GPU's column."""
    return LEFT + (gpu % GPUS_PER_NODE) * PITCH


def text(x: float, y: float, words: str, size: int = 17, **more: str) -> str:
    """One line of text; `more` holds attributes, with _ for -."""
    extra = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in more.items())
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{INK}"{extra}>{words}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, **more: str) -> str:
    """A rectangle."""
    extra = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in more.items())
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}"{extra}/>'


def arrow(path: str) -> str:
    """A path that ends in an arrow head."""
    style = f'fill="none" stroke="{INK}" stroke-width="2.5" marker-end="url(#head)"'
    return f'<path d="{path}" {style}/>'


def node_frame(node: int, y: float, height: float, title: str) -> list[str]:
    """A node's background, its title and its GPUs' numbers."""
    parts = [
        box(8, y, WIDTH - 16, height, NODE, rx="8", stroke=LINE),
        text(20, y + 25, title, 18, font_weight="600"),
    ]
    for gpu in range(node * GPUS_PER_NODE, (node + 1) * GPUS_PER_NODE):
        middle = gpu_x(gpu) + GPU / 2
        parts.append(text(middle, y + 52, str(gpu), text_anchor="middle"))
    parts.append(text(20, y + 52, "GPU"))
    return parts


def picture(height: float, title: str, description: str, parts: list[str]) -> str:
    """The whole file, on a background of its own."""
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img"',
        ' aria-labelledby="title description" font-family="system-ui, sans-serif">',
        f'<title id="title">{title}</title><desc id="description">{description}</desc>',
        f'<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="6"'
        f' markerHeight="6" orient="auto-start-reverse"><path d="M0 0L10 5L0 10z" fill="{INK}"/>'
        "</marker></defs>",
        box(0, 0, WIDTH, height, PAPER, rx="10"),
    ]
    return "\n".join([*head, *parts, "</svg>\n"])


def tensor_and_pipeline() -> str:
    """`tp=8,pp=2`: a node is a stage of two layers, each GPU has an eighth of every expert."""
    bar, rows = 5, NUM_EXPERTS
    layer_height, node_height, between = bar * rows, 286, 62
    parts: list[str] = []
    for node in range(2):
        top = 12 + node * (node_height + between)
        layers = (2 * node, 2 * node + 1)
        title = f"Node {node} · pipeline stage {node} · layers {layers[0]} and {layers[1]}"
        parts += node_frame(node, top, node_height, title)
        for place, layer in enumerate(layers):
            y = top + 66 + place * (layer_height + 16)
            parts.append(text(20, y + 46, f"Layer {layer}"))
            for gpu in range(GPUS_PER_NODE):
                x = gpu_x(gpu)
                for expert in range(rows):
                    fill = SKY if expert % 2 else SOFT
                    parts.append(box(x, y + expert * bar, GPU, bar, fill))
                parts.append(box(x, y, GPU, layer_height, "none", stroke=BLUE, stroke_width="1.5"))
                parts.append(
                    box(
                        *(x, y + MARKED * bar - 1, GPU, bar + 2, ORANGE),
                        stroke=INK,
                        stroke_width="1.5",
                    )
                )
        parts.append(text(LEFT, top + 271, "a stripe is an expert; a GPU has 1/8 of each", 16))
    y = 12 + node_height
    parts += [
        arrow(f"M{LEFT + 16} {y + 6}V{y + between - 6}"),
        text(LEFT + 34, y + 27, "PP send/recv of every token to stage 1;", 16),
        text(LEFT + 34, y + 48, "with one batch, one node waits", 16),
    ]
    bottom = 12 + 2 * node_height + between
    parts += [
        box(20, bottom + 18, 34, 10, ORANGE, stroke=INK, stroke_width="1.5"),
        text(64, bottom + 29, f"expert {MARKED}: cut in 8, a piece on every GPU of its stage", 16),
    ]
    return picture(
        bottom + 44,
        "Tensor parallel 8, pipeline parallel 2",
        "Two nodes of eight GPUs. Node 0 holds layers 0 and 1, node 1 layers 2 and 3. Every "
        "expert is cut into eight pieces, one on each GPU of its node.",
        parts,
    )


def expert_parallel() -> str:
    """`dp=16,ep=16`: every GPU has one whole expert of each of the four layers."""
    cell, step, node_height, between = 36, 42, 288, 62
    parts: list[str] = []
    first_row = 108  # under a node's top: attention stands above
    tops = [12 + node * (node_height + between) for node in range(2)]
    for node, top in enumerate(tops):
        title = f"Node {node} · all 4 layers · one expert of each per GPU"
        parts += node_frame(node, top, node_height, title)
        parts.append(text(20, top + 85, "Tokens"))
        for layer in range(NUM_LAYERS):
            y = top + first_row + layer * step
            parts.append(text(20, y + 24, f"Layer {layer}"))
        for gpu in range(node * GPUS_PER_NODE, (node + 1) * GPUS_PER_NODE):
            x = gpu_x(gpu)
            parts.append(box(x, top + 66, GPU, 26, "#ffffff", stroke=LINE, rx="13"))
            if gpu != OWNER:
                parts.append(text(x + GPU / 2, top + 85, "1/16", 16, text_anchor="middle"))
            for layer in range(NUM_LAYERS):
                marked = gpu == MARKED
                parts += [
                    box(
                        *(x, top + first_row + layer * step, GPU, cell),
                        ORANGE if marked else SKY if gpu % 2 else SOFT,
                        stroke=INK if marked else BLUE,
                        stroke_width="2.5" if marked else "1.5",
                    ),
                    text(
                        *(x + GPU / 2, top + first_row + layer * step + 24, f"E{gpu}"),
                        text_anchor="middle",
                        font_weight="600" if marked else "400",
                    ),
                ]
    parts += _token(tops, first_row, between)
    bottom = tops[1] + node_height
    parts += [
        f'<circle cx="36" cy="{bottom + 24}" r="8" fill="{INK}"/>',
        text(56, bottom + 29, f"a token of GPU {OWNER} chose experts {MARKED} and {SECOND}", 16),
        box(22, bottom + 42, 28, 18, ORANGE, stroke=INK, stroke_width="2.5"),
        text(56, bottom + 57, f"expert {MARKED}: whole, on one GPU", 16),
    ]
    return picture(
        bottom + 74,
        "Expert parallel 16",
        "Two nodes of eight GPUs. Every GPU holds one whole expert of each of four layers and a "
        "sixteenth of the sequences. A token of GPU 2 is sent to expert 5 on the same node and "
        "to expert 12 on the other.",
        parts,
    )


def _token(tops: list[int], first_row: int, between: int) -> list[str]:
    """One token on its way to its two experts of layer 0."""
    x, y = gpu_x(OWNER) + GPU / 2, tops[0] + 79
    row = tops[0] + first_row
    lane = gpu_x(OWNER) + GPU + GAP / 2  # between two columns
    node_end = tops[1] - between
    target = gpu_x(SECOND) + GPU / 2
    return [
        f'<circle cx="{x:g}" cy="{y}" r="8" fill="{INK}"/>',
        arrow(f"M{x:g} {y}V{row - 8}H{gpu_x(MARKED) + GPU / 2:g}V{row - 1}"),
        arrow(
            f"M{x:g} {row - 8}H{lane:g}V{node_end + 31}H{gpu_x(7) + GPU + 9:g}"
            f"V{tops[1] + 100}H{target:g}V{tops[1] + first_row - 1}"
        ),
        text(LEFT + 2, node_end + 27, "to the", 16),
        text(LEFT + 2, node_end + 48, "other node", 16),
    ]


if __name__ == "__main__":
    main()
