"""How optimize() finds chains of calls in a model and puts fused ops in their place.

One file per op says what its chains look like; the others are the mechanism:

- plan.py walks a model and lists the chains that can be fused, and the reasons for those that cannot;
- source.py, chains.py and resolve.py read a method: is this text the code that runs, which calls feed each
  other
  and nothing else, which objects do they call;
- known.py reads what torch's own modules and functions compute;
- site.py is the call that stands where the chain stood, bound.py the methods that hold sites;
- measure.py verifies and times sites in the running model, report.py is what explain() returns;
- graph.py does the like for graphs of Dynamo's, as a backend of torch.compile.
"""
