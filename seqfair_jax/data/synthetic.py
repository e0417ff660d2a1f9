"""stub"""
def generate(config): raise NotImplementedError
