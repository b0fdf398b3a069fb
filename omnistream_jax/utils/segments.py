"""How the tokens of a row are numbered, for what makes rows and for what reads them.

Segment 0 is padding. Image k of a row, from 1 on, is segment k * SHARED; the texts about it are those that follow, and
see it besides themselves. What stands alone has a number below SHARED.
"""

SHARED = 100
