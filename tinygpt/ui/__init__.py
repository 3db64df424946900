"""The page: one module a tab. Nothing outside this folder and app.py knows Gradio."""
