"""The user's own code: its functions as references, `module:function`, and the hash of what they compute."""
