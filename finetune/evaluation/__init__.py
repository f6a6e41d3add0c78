"""How good a base or an adapter is: losses, answers, likelihoods, public benchmarks."""
