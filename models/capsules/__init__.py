"""What surrounds the capsule network of day 21, which stands in the unit itself.

Modules: scenes (pictures made from digits), rival (a CNN of the same size), measures, figures.
"""
