"""What a mask says of each pair of positions, proven from the graph without computing the mask.

- `terms`: values and formulas; `bounds`: how large an expression can be
- `reader`: reading one element through the graph, by the rules of `views`, `elementwise` (with the algebra
  in `pointwise`) and `sources`; `constants`: what a buffer holds
- `runs`: documents packed into one row; `structure`: which diagonals a mask keeps
- `facts`: what an attention's mask was proven to be
"""
