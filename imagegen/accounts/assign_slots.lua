-- Gives each name without a budget slot its own, which is never given to another name.
--
-- KEYS    1 hash of the API keys, see change_key.lua
-- ARGV    names
for _, name in ipairs(ARGV) do
  local slot = 'slot:' .. name
  if not redis.call('HGET', KEYS[1], slot) then
    redis.call('HINCRBY', KEYS[1], 'version', 1)
    redis.call('HSET', KEYS[1], slot, redis.call('HINCRBY', KEYS[1], 'slots', 1))
  end
end
return false
