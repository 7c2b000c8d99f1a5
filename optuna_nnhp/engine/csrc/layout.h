/* Describes the structures shared with Python: `engine/library.py` compares the offset and the size
 * of every field with its own ctypes structures before it calls anything.
 */
struct FieldLayout {
    const char *structure, *field; /* the field is "" in the entry of a whole structure */
    int64_t offset, size;
};

#define STRUCTURE(type) {#type, "", 0, sizeof(struct type)}
#define FIELD(type, field) \
    {#type, #field, offsetof(struct type, field), sizeof(((struct type *)0)->field)}
#define END_OF_LAYOUT {0, 0, 0, 0}
