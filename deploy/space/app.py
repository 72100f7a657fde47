"""The web demo as a Hugging Face Space."""

import threading

from involution.demo import app

with app.serve(app.build(app.load(()), app.model_cards(())), host="0.0.0.0", port=7860):
    threading.Event().wait()
