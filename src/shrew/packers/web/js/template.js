// A conversation as the text that the model goes on with: by its own template, or as plain lines.

/** @param chat what `shrew pack` wrote to chat.json; @param Template the class of @huggingface/jinja, if it has a template */
export function renderer(chat, Template) {
  if (!chat.template) {
    return (messages) => {
      const lines = messages.map(({ role, content }) => `${chat.roles[role] ?? role}: ${content.trim()}`);
      return [...lines, `${chat.roles.assistant}:`].join("\n");
    };
  }
  const template = new Template(chat.template);
  return (messages) => {
    try {
      return template.render({ ...chat.special, messages, tools: null, documents: null, add_generation_prompt: true });
    } catch (error) {
      throw new Error(`The model's chat template refuses this conversation (${error.message}).`);
    }
  };
}
