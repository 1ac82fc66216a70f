"""What surrounds the convolutional networks of day 4, whose layers and designs stand in the unit itself.

Modules: twin (convolutions and networks beside Keras's), small (a NumPy network made of a lesson's layers), figures.
"""
