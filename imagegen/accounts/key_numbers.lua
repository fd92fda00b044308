-- Functions for the numbers in the hash of the API keys; put before the scripts that use them.
--
-- A value that another program wrote there counts as none. `key_store.py` has the same rules.
local MAX_SLOT, MAX_VERSION = 1000000, 2 ^ 53

-- Returns a number between 1 and a limit; nil for any other value.
local function number_of(value, limit)
  local number = value and string.match(value, '^[1-9]%d*$') and #value <= 16 and tonumber(value)
  if number and number <= limit then return number end
end

-- Counts a change. Where the count is unreadable it begins at the time in ms, which is more than any count.
local function count_change(key)
  local version = redis.call('HGET', key, 'version')
  if version and not number_of(version, MAX_VERSION - 1) then
    redis.call('HSET', key, 'version', string.format('%.0f', redis.call('TIME')[1] * 1000))
  end
  redis.call('HINCRBY', key, 'version', 1)
end

-- Returns whether a name has a budget slot.
local function has_slot(key, name)
  return number_of(redis.call('HGET', key, 'slot:' .. name), MAX_SLOT)
end

-- Gives a name a budget slot, which is never given to another name.
local function give_slot(key, name)
  local slots = redis.call('HGET', key, 'slots')
  if not number_of(slots, MAX_SLOT - 1) then
    local highest, fields = 0, redis.call('HGETALL', key)
    for i = 1, #fields, 2 do
      if string.sub(fields[i], 1, 5) == 'slot:' then
        highest = math.max(highest, number_of(fields[i + 1], MAX_SLOT - 1) or 0)
      end
    end
    redis.call('HSET', key, 'slots', highest)
  end
  redis.call('HSET', key, 'slot:' .. name, redis.call('HINCRBY', key, 'slots', 1))
end
