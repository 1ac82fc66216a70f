"""What training on several devices and in 16 bits needs around it; the ideas stand in days 10 and 12.

Modules: resnet (the network that both days train), replicas (what day 10 measures), cluster and worker (real processes
on one machine, restarted when one dies), cost (what communication costs at 8 to 256 GPUs), pipelines and overhead (what
the input and the core cost), precision and benchmark (16 bits measured), report (the records as tables), kubernetes/
(the same job on several machines).
"""
