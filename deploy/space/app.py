"""The page of involution, as a Space runs it."""

import threading

from involution.demo import app

with app.served(app.build(app.load(()), app.cards(())), host="0.0.0.0", port=7860):
    threading.Event().wait()
