-- Moves keys of another type than ours aside, so that the service can go on; people can look at them for a week.
--
-- KEYS  two a key: its name, the name it gets
-- ARGV  1 life of what was moved, in seconds; then the type that each key is to have
-- returns the keys that were moved
local moved = {}
for i = 1, #KEYS / 2 do
  local kind = redis.call('TYPE', KEYS[i * 2 - 1]).ok
  if kind ~= 'none' and kind ~= ARGV[i + 1] then
    redis.call('RENAME', KEYS[i * 2 - 1], KEYS[i * 2])
    redis.call('EXPIRE', KEYS[i * 2], ARGV[1])
    moved[#moved + 1] = KEYS[i * 2 - 1]
  end
end
return moved
