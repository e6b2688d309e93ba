"""What stands around the loss. Open the file of the question:

- `builders`: which tokens are compared, besides the teacher's top K?
- `composition`: which teacher, if several distributions make one?
- `rollout`: how does the student sample, and what is the sampled-token baseline?
- `rewards`: which reward does a policy gradient get for the sampled token?
- `weighting`: which positions count, and how do the losses of many become one?
- `sequences`: where does each sequence of a packed row start? The others use it.
"""
