-- Gives each name without a budget slot its own.
--
-- KEYS    1 hash of the API keys, see change_key.lua
-- ARGV    names
for _, name in ipairs(ARGV) do
  if not has_slot(KEYS[1], name) then
    count_change(KEYS[1])
    give_slot(KEYS[1], name)
  end
end
return false
