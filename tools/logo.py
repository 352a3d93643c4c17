"""Draws the logo: a convex scan with the pleura, two A-lines and a B-line. `python tools/logo.py`"""

from math import cos, radians, sin
from pathlib import Path

SIZE, APEX, NEAR, FAR, HALF = 64, (32, -8), 18, 68, 27  # pixels; the fan reaches HALF degrees to either side
SHAPES = (  # depth along the fan, from and to which angle, width, colour
    (26, -21, 21, 3.0, '#ffffff'),  # the pleura
    (38, -16, 4, 2.0, '#9ec5ff'),  # its first repetition, an A-line
    (50, -16, 4, 1.6, '#9ec5ff'),
)


def at(
    depth: float,  # from the apex, pixels
    angle: float,  # from straight down, degrees
) -> str:  # 'x y', as SVG has it
    "A point of the fan."
    x, y = APEX
    return f'{x + depth * sin(radians(angle)):.1f} {y + depth * cos(radians(angle)):.1f}'


def arc(
    depth: float,  # from the apex, pixels
    start: float,  # degrees
    end: float,  # degrees
) -> str:  # of a path
    "A curve at one depth."
    return f'{at(depth, start)} A {depth} {depth} 0 0 {int(end < start)} {at(depth, end)}'


def logo() -> str:  # SVG
    "The whole picture."
    fan = f'M {arc(NEAR, -HALF, HALF)} L {arc(FAR, HALF, -HALF)} Z'
    lines = [f'<path d="{fan}" fill="#123a6b" stroke="#9ec5ff" stroke-width="1.5"/>']
    lines += [
        f'<path d="M {arc(d, a, b)}" fill="none" stroke="{c}" stroke-width="{w}" stroke-linecap="round"/>'
        for d, a, b, w, c in SHAPES
    ]
    lines.append(f'<path d="M {at(27, 11)} L {at(66, 10)} L {at(66, 14)} Z" fill="#ffffff" opacity=".85"/>')
    body = '\n'.join(lines)
    size = f'width="{SIZE}" height="{SIZE}" viewBox="0 0 {SIZE} {SIZE}"'  # no width: a navbar shows none
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n{body}\n</svg>\n'


if __name__ == '__main__':
    (Path(__file__).resolve().parents[1] / 'nbs/images/logo.svg').write_text(logo(), encoding='utf-8')
